"""PyTorch's own compiler, Inductor: int8 kernels on x86 CPUs for convolutions and linear layers of up to 8 bits.

The compiler recognises quantize, dequantize and a layer between them, and puts one int8 kernel in their place. Three
things make that faithful, and all are done here: the passes are there only once torchao is imported; codes are uint8,
so a signed grid gets the zero point 128; and the range is clamped before, in floats, as the kernels know 0 to 255 only.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.nn.functional import conv2d, linear

from nipq.errors import require
from nipq.export.portable import PortableLayer, portable_layers
from nipq.export.runtimes import CompiledModel, Kernel
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    become_,
    check_deployed,
    deployed_layers,
)
from nipq.nn.kinds import along_channels
from nipq.prepare.batches import ExampleInputs, call_model
from nipq.prepare.convert import bare_model
from nipq.prepare.plan import inductor_reason

#: The compiler's counts of what it recognised.
COUNTS = {nn.Conv2d: "qconv_weight_prepack_matcher_count", nn.Linear: "qlinear_weight_prepack_matcher_count"}
#: Weights become constants of the compiled code, as the passes require; set around calls only.
FREEZING = config.patch(freezing=True)
#: Zero point of a signed grid: the kernels read uint8.
SIGNED_ZERO_POINT = 128


class Int8Layer(nn.Module):
    """A deployed layer in the operators that the compiler recognises.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: DeployedLayer, numbers: PortableLayer) -> None:
        super().__init__()
        assert numbers.input is not None
        self.shell, self.step = layer.layer, float(numbers.input.scale)
        self.zero_point = SIGNED_ZERO_POINT if numbers.input.grid == "signed" else numbers.input.zero_point
        limits = torch.tensor([layer.code_low, layer.code_high]) * numbers.input.scale
        self.low, self.high = (float(limit) for limit in limits)
        channels = numbers.weight.shape[0]
        self.register_buffer("weight_codes", numbers.weight)
        self.register_buffer("weight_scale", numbers.weight_scale.expand(channels).clone())
        self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("bias", numbers.bias)

    @property
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at its type; see ``nipq.nn.deployed``."""
        return self.weight_codes * along_channels(self.weight_scale, self.shell, self.weight_codes)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: its input.
        """
        operators, given = torch.ops.quantized_decomposed, (self.step, self.zero_point, 0, 255, torch.uint8)
        x = operators.quantize_per_tensor(torch.clamp(x, self.low, self.high), *given)
        x = operators.dequantize_per_tensor(x, *given)
        axis_and_range = (0, -127, 127, torch.int8)
        weight = operators.dequantize_per_channel(
            self.weight_codes, self.weight_scale, self.weight_zero_point, *axis_and_range
        )
        shell: Any = self.shell
        if isinstance(shell, nn.Linear):
            return linear(x, weight, self.bias)
        return conv2d(x, weight, self.bias, shell.stride, shell.padding, shell.dilation, shell.groups)


class InductorModel(CompiledModel):
    """A deployed model compiled by Inductor.

    Args:
        compiled: the compiled function.
        kernels: how each layer is computed.
        warnings: differences from the deployed model.
    """

    def __init__(self, compiled: Callable[..., Any], kernels: Sequence[Kernel], warnings: Sequence[str]) -> None:
        super().__init__("Inductor", kernels, warnings)
        self.compiled = compiled

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  (the model's own arguments and output)
        """The model's output; another batch size compiles again.

        Args:
            *args: the model's arguments, on the CPU.
            **kwargs: the same by name.
        """
        with FREEZING:  # the first call with a new shape compiles
            return self.compiled(*args, **kwargs)


@torch.no_grad()
def inductor_model(deployed: nn.Module, example_inputs: ExampleInputs, *, strict: bool = True) -> InductorModel:
    """Compile a deployed model for an x86 CPU, in int8 wherever its layers allow.

    Layers that the passes do not know (other kinds, padding modes, more than 8 bits) stay as they are, exact in floats.
    An input's code is ``round(x * (1 / step))`` in the compiler's kernels, not ``round(x / step)``: next to the
    middle of two levels a code may differ by one.

    Args:
        deployed: a model from ``nipq.convert`` or ``nipq.load``; it is not changed.
        example_inputs: its inputs; compiled for this batch size now, for others when they come.
        strict: refuse a model whose layers the compiler did not all recognise.

    Returns:
        A module that is called like the model, with ``kernels`` and ``warnings``.

    Raises:
        ConfigError: if ``deployed`` holds no deployed layer, or ``strict`` and a layer was not recognised.
        MissingDependencyError: if torchao is not installed.
    """
    with _quiet():
        for module in (
            "torch.ao.quantization.fx._decomposed",  # the operators
            "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",  # the passes, registered by the import alone
        ):
            require(module, extra="inductor", purpose="integer kernels from PyTorch's compiler")
    deployed = bare_model(deployed, "inductor_model")
    check_deployed(deployed, "inductor_model")
    clone = copy.deepcopy(deployed).cpu().eval()
    numbers = portable_layers(clone)
    reasons = {name: _reason(layer) for name, layer in deployed_layers(clone).items()}
    forms: dict[nn.Module, nn.Module] = {
        layer: Int8Layer(layer, numbers[name])
        for name, layer in deployed_layers(clone).items()
        if reasons[name] is None and isinstance(layer, DeployedLayer)
    }
    kinds = {name: type(layer.layer) for name, layer in deployed_layers(clone).items()}
    for layer, form in forms.items():
        become_(layer, form)
    compiled: Any = torch.compile(clone, dynamic=False)
    before = {kind: counters["inductor"][key] for kind, key in COUNTS.items()}
    with FREEZING:
        call_model(compiled, example_inputs)
    found = {kind: counters["inductor"][key] - before[kind] for kind, key in COUNTS.items()}
    warnings = [f"{name}: {reason}; computed in floats, exactly" for name, reason in reasons.items() if reason]
    model = InductorModel(compiled, _kernels(reasons, kinds, found), warnings)
    if strict:
        model.check_integer()
    return model


def _reason(layer: Deployed) -> str | None:
    """The reason for which a layer stays as it is, or None."""
    if isinstance(layer, DeployedKeptLayer):
        return f"a {layer.kind} whose forward does more than its operation"
    if not isinstance(layer, DeployedLayer):
        return "its input stays float"
    if max(layer.code_bits, layer.input_bits) > 8:
        return "codes of more than 8 bits"
    return inductor_reason(layer.layer)


def _kernels(
    reasons: dict[str, str | None], kinds: dict[str, type[nn.Module]], found: dict[type[nn.Module], int]
) -> list[Kernel]:
    """Kernels by the compiler's counts: it names no layers, so a kind is in integers as a whole or not at all."""
    wanted = {kind: sum(reasons[name] is None and kinds[name] is kind for name in reasons) for kind in COUNTS}
    kernels = []
    for name, reason in reasons.items():
        kind = kinds[name]
        if reason is not None:
            kernels.append(Kernel(name, reason, integer=False, expected=False))
        else:
            what = f"{found[kind]} of {wanted[kind]} {kind.__name__} recognised"
            kernels.append(Kernel(name, what, integer=found[kind] == wanted[kind], expected=True))
    return kernels


class _quiet:  # noqa: N801  (used as a context)
    """Silences torchao's remarks on import about extensions that were not built; none of them is used here."""

    def __enter__(self) -> None:
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_error: object) -> None:
        logging.disable(self.level)
