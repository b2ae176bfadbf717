"""The same training step with other libraries: each quantizes the weight and the input of every layer to 4 bits.

All of them are optional, and none is part of the package. Their defaults are kept but for what is said at each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer

from nipq.errors import require

BITS = 4

Penalty = Callable[[], Tensor]


class TorchFakeQuantize(nn.Module):
    """Fused quantizer of torch with a learned scale; the zero point stays, as its gradient may push it out of range."""

    zero_point: Tensor

    def __init__(self, *, signed: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1))
        self.low = -(2 ** (BITS - 1)) if signed else 0
        self.high = self.low + 2**BITS - 1

    @torch.no_grad()
    def start_(self, x: Tensor) -> None:
        """Let the range reach to the largest magnitude."""
        self.scale.fill_(float(x.abs().amax()) / self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid, shape of x."""
        out: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
            x, self.scale, self.zero_point, self.low, self.high, 1.0
        )
        return out


def torch_learnable(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Learnable fake-quant of torch on weights and inputs, clipping ranges started from one batch.

    Args:
        model: a float model; changed.
        inputs: the batch.
    """
    watched = []
    for layer in _layers(model):
        watched.append(layer.register_forward_pre_hook(_start_from_first_batch))
        weight = TorchFakeQuantize(signed=True)
        weight.start_(layer.weight)
        register_parametrization(layer, "weight", weight)
    with torch.no_grad():
        model(inputs)
    for hook in watched:
        hook.remove()
    for layer in _layers(model):
        layer.register_forward_pre_hook(lambda module, args: (module.input_quantizer(args[0]), *args[1:]))
    return model


def _start_from_first_batch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
    quantizer = TorchFakeQuantize(signed=bool((args[0] < 0).any()))
    quantizer.start_(args[0])
    layer.input_quantizer = quantizer


def brevitas(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Brevitas layers, scales learned after one batch of statistics instead of 300, no tensor classes between layers.

    Args:
        model: a float model; its layers are replaced.
        inputs: a batch, which the scales start from.
    """
    layers = require("brevitas.nn", extra="brevitas", purpose="the comparison with Brevitas")
    quantizers = require("brevitas.quant", extra="brevitas", purpose="the comparison with Brevitas")
    settings = {
        "weight_quant": quantizers.Int8WeightPerTensorFloat, "weight_bit_width": BITS,
        "weight_scaling_impl_type": "parameter_from_stats",
        "input_quant": quantizers.Int8ActPerTensorFloat, "input_bit_width": BITS, "input_collect_stats_steps": 1,
        "return_quant_tensor": False,
    }  # fmt: skip
    for name, layer in list(model.named_modules()):
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Conv2d):
            own = ("kernel_size", "stride", "padding", "dilation", "groups")
            given = {key: getattr(layer, key) for key in own} | {"bias": bias} | settings
            new = layers.QuantConv2d(layer.in_channels, layer.out_channels, **given)
        elif isinstance(layer, nn.Linear):
            new = layers.QuantLinear(layer.in_features, layer.out_features, bias=bias, **settings)
        else:
            continue
        new.load_state_dict(layer.state_dict(), strict=False)
        model.set_submodule(name, new)
    model.train()
    for _ in range(2):
        model(inputs)
    return model


def diffq(model: nn.Module, optimizer: Optimizer) -> Penalty:
    """DiffQ, which quantizes weights alone, in groups of 8.

    Args:
        model: a float model, in the optimizer already.
        optimizer: it gets the bit-widths, too.

    Returns:
        The model's size in megabytes, for the loss.
    """
    package = require("diffq", extra="diffq", purpose="the comparison with DiffQ")
    quantizer = package.DiffQuantizer(model, group_size=8)
    quantizer.setup_optimizer(optimizer)
    size: Penalty = quantizer.model_size
    return size


def _layers(model: nn.Module) -> Sequence[nn.Conv2d | nn.Linear]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
