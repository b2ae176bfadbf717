"""A method's settings laid under those that a user gives."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from nipq.config import Settings
from nipq.errors import ConfigError
from nipq.train.methods import METHODS

WHOLE = ("weight_bits", "activation_bits")
"""Sections that mean something only as one: a range is not made of two."""


def with_method(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run's config, completed by those of the method that they name.

    Args:
        fields: Nested values; ``method`` is a word of :data:`~nipq.train.methods.METHODS`, ``"nipq"`` if left out.

    Returns:
        A new tree, in which what was given stands.

    Raises:
        ConfigError: If there is no such method; the message lists them.
    """
    word = fields.get("method", "nipq")
    if not isinstance(word, str) or word not in METHODS:
        close = get_close_matches(str(word), METHODS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}; found {word!r}{hint}")
    return merged(METHODS[word], fields)


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields laid over each other: what several have is taken from the last, sections are joined.

    Args:
        trees: Nested values; of :class:`~nipq.config.Settings` laid over a section only the given fields count.

    Returns:
        A new tree that shares nothing with the given ones.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": None})
        {'a': {'b': 4, 'c': 2}, 'd': None}
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            new = value.model_dump(exclude_unset=True) if key in result and isinstance(value, Settings) else value
            joined = key not in WHOLE and isinstance(old, Mapping) and isinstance(new, Mapping)
            result[key] = merged(old, new) if joined else copy.deepcopy(value)  # type: ignore[arg-type]  # trees if joined
    return result
