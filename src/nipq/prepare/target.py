"""What a runtime computes in integers and as trained: which layers of a model it will not, said before training.

Bit-widths are checked by :class:`nipq.config.Config` itself. Grids need no check: every runtime takes signed and
unsigned ones, and shifted ones with whole zero points, and there are no others.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nipq.config import Target
from nipq.nn.layers import LayerSpec
from nipq.prepare.plan import LayerPlan

#: Layers that the compiler's int8 passes know.
INDUCTOR_KINDS = (nn.Conv2d, nn.Linear)


def target_notes(
    model: nn.Module, plans: dict[str, tuple[LayerSpec, LayerPlan]], shared: dict[str, tuple[str, ...]], target: Target
) -> Iterator[tuple[str, str]]:
    """Layers that a runtime computes otherwise than in integers.

    Args:
        model: the float model.
        plans: layers that are to be quantized and their settings, by name.
        shared: names of the layers that read the same tensor, by the name of each.
        target: the runtime.

    Yields:
        Name of the layer (empty for the model) and what the runtime does.
    """
    if target == "onnxruntime":
        yield "", "ONNX Runtime computes what was trained in its faithful session only, on exact levels in floats"
        return
    for name, (spec, plan) in plans.items():
        if spec.is_product:
            if target == "inductor":
                yield name, "it is a product inside attention, which Inductor computes in floats, exactly and slowly"
            continue
        if spec.is_table:
            continue  # looked up everywhere
        layer = model.get_submodule(name)
        others = [other for other in shared.get(name, ()) if other in plans and other != name]
        if plan.activation_bits is None:
            yield name, f"its input stays float, so {_NAMES[target]} computes it in floats"
        elif target == "inductor" and (reason := inductor_reason(layer)):
            yield name, f"it is {reason}, which Inductor computes in floats, exactly and slowly"
        elif target == "openvino" and isinstance(layer, _TRANSPOSED) and layer.groups > 1:
            yield name, "it is a grouped transposed convolution, which OpenVINO computes in floats"
        elif target == "openvino" and others:
            yield name, f"it reads the same tensor as {', '.join(others)}, so OpenVINO may compute it in floats"


def inductor_reason(layer: nn.Module) -> str | None:
    """What keeps Inductor's int8 passes from a layer of at most 8 bits.

    Args:
        layer: the layer, or its shell.

    Returns:
        What it is, or None if nothing does.

    Example:
        >>> inductor_reason(nn.Conv1d(1, 1, 1)), inductor_reason(nn.Linear(1, 1))
        ('a Conv1d, not a plain Conv2d or Linear', None)
    """
    if type(layer) not in INDUCTOR_KINDS:
        return f"a {type(layer).__name__}, not a plain Conv2d or Linear"
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else f"a {type(layer).__name__} with padding mode {mode!r}"


_NAMES = {"openvino": "OpenVINO", "inductor": "Inductor"}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
