"""Build networks with their weights, and tasks, from their names in a config."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nipq.errors import ConfigError, FileFormatError, first_line, require
from nipq.train.task import Classification, Task
from nipq.train.user_code import user_code

if TYPE_CHECKING:
    from nipq.train.config import ModelConfig, TrainConfig

#: Stands for the weights that torchvision publishes.
PUBLISHED = "DEFAULT"


def build_model(config: ModelConfig, *, with_weights: bool = True) -> nn.Module:
    """Build the network that a config names and load its weights.

    Args:
        config: the ``model`` or ``teacher`` section.
        with_weights: ``False`` leaves the random start, for a state dict that follows.

    Returns:
        The network on the CPU.

    Raises:
        ConfigError: if the factory is unknown or refuses its arguments, or published weights cannot be had.
        FileFormatError: if a weights file is not a state dict of this network.
    """
    factory = find_factory(config.factory)
    with user_code(f"model factory {config.factory!r}"):
        try:
            model = factory(**config.kwargs)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"model factory {config.factory!r} refused the arguments {config.kwargs}: {error}; correct model.kwargs"
            ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model factory {config.factory!r} must return a module, it gave {type(model).__name__}")
    if with_weights and config.weights is not None:
        state = _published(config.factory) if config.weights == PUBLISHED else read_state(Path(config.weights))
        _load(model, state, config)
    return model


def find_factory(name: str) -> Callable[..., Any]:
    """Find the callable behind a torchvision model's name or ``package.module:callable``; else ConfigError."""
    if ":" in name:
        return import_callable(name, "model factory")
    models = require("torchvision.models", extra="vision", purpose="torchvision's networks")
    try:
        builder: Callable[..., Any] = models.get_model_builder(name)
    except ValueError as error:
        close = [known for known in models.list_models(models) if name[:4].lower() in known]
        raise ConfigError(
            f"no torchvision model {name!r} (similar: {', '.join(close[:6]) or 'none'}); "
            "give a torchvision name or package.module:callable"
        ) from error
    return builder


def import_callable(path: str, what: str) -> Callable[..., Any]:
    """Import ``package.module:callable``; ``what`` is its role, for the message of the ConfigError if there is none."""
    module_name, _, attribute = path.partition(":")
    with user_code(f"{what} {path!r}"):
        return _imported(path, what, module_name, attribute)


def _imported(path: str, what: str, module_name: str, attribute: str) -> Callable[..., Any]:
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"no {what} {path!r}: {error}; give package.module:callable, and PYTHONPATH=. if "
            "the module lies in this folder"
        ) from error
    return found


#: Packages whose networks are imported for a run folder from anywhere.
TRUSTED = ("nipq", "torchvision", "timm", "transformers")


def check_trusted(config: TrainConfig, place: str, *, trust: bool) -> None:
    """Refuse to import code that a run folder names, but for networks of well-known packages: a run folder is code.

    Args:
        config: of the run.
        place: the folder, for the message.
        trust: the folder is the user's own.

    Raises:
        ConfigError: naming the field and what it names.
    """
    named = {"model.factory": config.model.factory, "data.factory": config.data.factory}
    named |= {"task": config.task if config.task != "classification" else None}
    for field, name in named.items():
        if name is None or trust or (":" not in name and field == "model.factory") or _is_known(name):
            continue
        raise ConfigError(
            f"{place}: expected a run whose {field} is of {', '.join(TRUSTED)}, found {name!r}, code that would be "
            "run; pass --trust if the folder is your own"
        )


def _is_known(name: str) -> bool:
    """Return whether ``package.module:callable`` is a class or function that one of :data:`TRUSTED` defines itself."""
    module, _, attribute = name.partition(":")
    if module.split(".")[0] not in TRUSTED or not attribute.isidentifier():
        return False
    found = import_callable(name, "code")
    home = getattr(found, "__module__", None) or ""
    return isinstance(found, (type, FunctionType)) and home.split(".")[0] == module.split(".")[0]


def build_task(config: TrainConfig) -> Task:
    """Build the task of a run; ConfigError if there is none, or its callable returns something else."""
    if config.task == "classification":
        temperature = 1.0 if config.teacher is None else config.teacher.temperature
        return Classification(config.label_smoothing, temperature)
    task = import_callable(config.task, "task")(config)
    if not isinstance(task, Task):
        raise ConfigError(f"task {config.task!r} must return a Task, it gave {type(task).__name__}")
    return task


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict without running anything stored in it.

    Args:
        path: a ``.safetensors`` file, or a torch file that holds a state dict, plain or under ``state_dict``/``model``.

    Returns:
        Tensors by name.

    Raises:
        ConfigError: if there is no such file.
        FileFormatError: if the file is something else.
    """
    if not path.is_file():
        raise ConfigError(f"expected a weights file, found nothing at {path}; correct model.weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileFormatError(f"expected a state dict in {path}, found something else: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise FileFormatError(
            f"expected a dict of tensors in {path}, found {type(state).__name__}; save model.state_dict()"
        )
    return state


def _published(name: str) -> dict[str, Tensor]:
    """The default weights that torchvision publishes, from its cache or the network."""
    models = require("torchvision.models", extra="vision", purpose="published weights")
    try:
        url = models.get_model_weights(name).DEFAULT.url
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"torchvision publishes no weights for {name!r}; give model.weights a file or null"
        ) from error
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if file.is_file():
        return read_state(file)
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the published weights of {name!r} are not in the cache and could not be fetched ({first_line(error)}); "
            f"fetch {url} on a connected machine and put it at {file}, or give its path as weights"
        ) from error
    return state


def _load(model: nn.Module, state: dict[str, Tensor], config: ModelConfig) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise FileFormatError(
            f"the weights {config.weights!r} are not those of {config.factory!r} with {config.kwargs}: {error}"
        ) from error
