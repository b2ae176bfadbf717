"""Models inside wrappers: looked into where one is around the whole model, refused by name around a part of it."""

from __future__ import annotations

from torch import nn

from nipq.distributed import is_sharded
from nipq.errors import NotQuantizableError

#: Where wrappers hold what they wrap, by name of their class, so that none has to be imported.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
}
#: Those that spread parameters over processes.
_SHARDING = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def unwrapped(model: nn.Module, command: str) -> nn.Module:
    """The model inside the wrappers around it, or the model itself, so that no name gets a prefix.

    Args:
        model: any model.
        command: in whose name it is refused.

    Raises:
        NotQuantizableError: if a part of the model is wrapped, or its parameters are spread over processes.
    """
    while (inside := _inside(model)) is not None:
        model = inside
    for name, module in model.named_modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        where = name or type(module).__name__
        if not kinds.isdisjoint(_SHARDING) or any(map(is_sharded, module.parameters(recurse=False))):
            raise NotQuantizableError(
                f"{command}: {where}: expected whole parameters, found them sharded over processes. Load the full "
                "state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
                "into a model that is not sharded, prepared with the same config."
            )
        if _inside(module) is not None:
            raise NotQuantizableError(
                f"{command}: {where}: expected parts of a model as they are, found one inside {type(module).__name__}. "
                "Take the wrapper off, or put it around the whole model."
            )
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    kinds = {kind.__name__ for kind in type(module).__mro__}
    return next((module._modules.get(part) for kind, part in _INSIDE.items() if kind in kinds), None)
