"""Reading a run's YAML file, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nipq.errors import ConfigError
from nipq.train.config import TrainConfig


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file into a checked config.

    Args:
        path: The file.
        overrides: Dotted field names and the values that replace the file's, e.g. ``{"optimizer.lr": 0.01}``.

    Returns:
        The config.

    Raises:
        ConfigError: If the file is missing, is not YAML, or a field is unknown or wrong. The message names the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a YAML config file, found {str(path)!r}: {error}; give the path of one") from error
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"expected a mapping of fields in {path}, found {type(tree).__name__}; see configs/ for examples"
        )
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    return check_config(tree, source=str(path))


def check_config(tree: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """Turn nested plain values into a config.

    Args:
        tree: Nested mappings, as read from YAML or JSON.
        source: What to call it in messages.

    Returns:
        The config.

    Raises:
        ConfigError: Naming every field that is wrong.
    """
    try:
        return TrainConfig.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{source} is not a valid config:\n{error}") from error


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; the value is YAML, so ``3``, ``true``, ``null`` and ``[1, 2]`` mean what they say.

    Args:
        assignments: The texts, e.g. ``["seed=3", "optimizer.lr=0.01"]``.

    Returns:
        Values by dotted field name.

    Raises:
        ConfigError: If a text has no ``=`` or its value is not YAML.

    Example:
        >>> parse_overrides(["seed=3", "teacher=null"])
        {'seed': 3, 'teacher': None}
    """
    result = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"expected key=value, found {text!r}; write for instance optimizer.lr=0.01")
        result[key.strip()] = _parse(value, f"the value of {key.strip()}")
    return result


def dump_config(config: TrainConfig) -> str:
    """The config as YAML text that :func:`load_config` reads back to an equal config."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def _parse(text: str, source: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}; correct it at the place named") from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - a YAML value
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"cannot set {key}: {name!r} is {child!r}, not a section; set {name!r} itself instead")
        node = child
    node[last] = value
