"""Teacher forcing: a deployed model's layers get the trained model's inputs, so that each answers for itself.

The trained model runs in phase ``"round"``, in the modules that its author wrote, and the input of every layer is kept.
The deployed model then runs with each layer's input *replaced* by the kept one, so that a fault shows in the layer that
makes it. The tensor that had arrived there is compared first: its codes show all that happened since the layers
before, be it a folded batch norm, an activation or a sum. A product inside attention is a layer with two inputs. The
model's results are compared as if they were one more layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nipq.errors import NipqError, first_line
from nipq.functional.uniform import widened
from nipq.nn.deployed import (
    DeployedKeptLayer,
    DeployedLayer,
    DeployedOperand,
    deployed_layers,
    deployed_products,
)
from nipq.nn.quantizer import InputQuantizer
from nipq.prepare.layer_table import LayerRow, operand_point, quantizers_at

#: Largest share of codes that may flip by one level between two layers, as sums run in another order.
FLIPS = 1e-4
#: The same for each level of the grid: a float32 sum that is off by so much of the range flips that share of codes.
FLIPS_PER_LEVEL = 4e-7
#: Largest difference of a layer's output relative to its largest value: some float32 roundings of a long sum.
OUTPUT_TOLERANCE = 1e-5
#: Largest difference of the model's results, relative likewise: more may stand between a layer and them.
RESULT_TOLERANCE = 1e-3
#: Roundings of half precision that a trained layer may be off by: its weights, sums and output are rounded, and a batch
#: norm behind it enlarges what they are off by. Cast a model to float32 for a tighter proof.
HALF_ROUNDINGS = 32
#: Name under which the model's results are compared.
RESULTS = "the model's results"

_CALLS_DIFFER = "called differently often, or on other shapes, than in the trained model"

#: How deep results may lie in objects.
_DEEPEST = 4


def results_in(value: object, depth: int = 0) -> Iterator[Tensor]:
    """Tensors that a model returns: alone, in mappings, sequences, dataclasses and other objects, however deep."""
    inside: Any = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (tuple, list)):
        inside = value
    elif is_dataclass(value) and not isinstance(value, type):
        inside = (getattr(value, part.name) for part in fields(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        inside = vars(value).values() if depth < _DEEPEST else ()
    for item in inside:
        yield from results_in(item, depth + 1)


def float_results(value: object) -> list[Tensor]:
    """Floating tensors that a model returns, see :func:`results_in`."""
    return [tensor for tensor in results_in(value) if tensor.is_floating_point()]


class BrokenLayerError(NipqError):
    """A deployed layer does not run; named by the message."""


@dataclass
class Calls:
    """Inputs and outputs of each layer or product, call by call, and the model's results.

    Attributes:
        inputs: by quantization point, before quantization.
        codes: by quantization point, the whole codes of those inputs; nothing for layers whose input stays float.
        outputs: by layer or product, after the batch norm that is folded into it.
        read_outside: layers whose weight something else than their own forward read.
        results: floating tensors that the model returned.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    codes: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    read_outside: dict[str, None] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)


@dataclass
class LayerComparison:
    """Differences of one layer, product or operand (E1, E3), summed over calls and batches.

    Attributes:
        calls_differ: whether the layer was called differently often, or on different shapes.
        codes: codes compared.
        wrong: codes that differ on the same input.
        flips: codes that differ on what arrived when the layers before got the trained inputs.
        jump: largest such difference in levels.
        error: largest difference of an output.
        largest: largest magnitude of an output.
        exact_codes: codes that differ between the deployed model and the trained one in phase ``"int"``.
        levels: levels of the grid of its input.
        inexact: whether the format itself may round a code of the same input to the other side.
        half: one rounding of the type that the trained layer computes in, if that is half precision; else 0.
        tolerance: largest relative difference of an output that float32 explains.
        suspects: layers whose weight something else than their own forward reads.
    """

    calls_differ: bool = False
    codes: int = 0
    wrong: int = 0
    flips: int = 0
    jump: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    exact_codes: int = 0
    levels: int = 0
    inexact: bool = False
    half: float = 0.0
    tolerance: float = OUTPUT_TOLERANCE
    suspects: dict[str, None] = field(default_factory=dict)

    @property
    def allowed(self) -> float:
        """Share of codes of what arrived that may flip; of half precision all, as its roundings are levels wide."""
        return 1.0 if self.half else max(FLIPS, FLIPS_PER_LEVEL * self.levels)

    @property
    def longest_jump(self) -> float:
        """Levels that a code of what arrived may be off by."""
        return math.inf if self.half else 1

    @property
    def output_tolerance(self) -> float:
        """Largest difference of an output, relative to its largest value."""
        return max(self.tolerance, HALF_ROUNDINGS * self.half)

    def add_codes(self, expected: Tensor, same_input: Tensor, arrived: Tensor) -> None:
        """Add the codes of one call (E1).

        Args:
            expected: whole codes of the trained layer.
            same_input: codes of the deployed layer on the trained input.
            arrived: its codes of what arrived when the layers before got the trained inputs.
        """
        distance = (arrived - expected).abs()
        self.codes += expected.numel()
        self.wrong += int((same_input != expected).sum())
        self.flips += int((distance != 0).sum())
        self.jump = larger(self.jump, distance)
        if self.inexact:
            self.jump = larger(self.jump, (same_input - expected).abs())

    def add_output(self, expected: Tensor, found: Tensor) -> None:
        """Add the output of one call (E1)."""
        self.note_type(expected)
        expected, found = expected.to(torch.promote_types(expected.dtype, torch.float32)), found.to(expected.device)
        self.error = larger(self.error, distances(expected, found))
        self.largest = larger(self.largest, torch.where(expected.isinf(), 0, expected).abs())

    def note_type(self, trained: Tensor) -> None:
        """Take note of the type that the trained layer computes in."""
        if trained.dtype in (torch.float16, torch.bfloat16):
            self.half = max(self.half, torch.finfo(trained.dtype).eps)

    def layer_fault(self) -> str | None:
        """The reason for which E1 fails here, or None."""
        if self.calls_differ:
            return _CALLS_DIFFER
        most = math.ceil(self.allowed * self.codes)
        if self.wrong > (most if self.inexact else 0):
            return f"{self.wrong:,} of {self.codes:,} codes differ on the same input"
        if not self.jump <= self.longest_jump:
            return f"codes of what arrived differ by up to {self.jump:g} levels{self._readers()}"
        if self.flips > most:
            flipped = f"{self.flips:,} of {self.codes:,} codes of what arrived flipped"
            return f"{flipped}, more than {self.allowed:g} of them{self._readers()}"
        return self.output_fault()

    def _readers(self) -> str:
        """Advice on layers that came before, where something reads weights past their layers."""
        return f" (something else reads the weight of {', '.join(self.suspects)})" if self.suspects else ""

    def output_fault(self) -> str | None:
        """The reason for which the output is wrong, or None."""
        if self.error <= self.output_tolerance * self.largest:
            return None
        most = f"more than {self.output_tolerance:g} of its largest value"
        return f"the output differs by {self.error:.3g}, {most}{self._readers()}"

    def exact_fault(self) -> str | None:
        """The reason for which E3 fails here, or None."""
        if self.calls_differ:
            return _CALLS_DIFFER
        return f"{self.exact_codes:,} codes differ from phase int" if self.exact_codes else None


def distances(expected: Tensor, found: Tensor) -> Tensor:
    """Absolute differences; 0 where both are the same infinity."""
    return torch.where(expected == found, 0, (found - expected).abs())


def larger(so_far: float, values: Tensor) -> float:
    """The larger of a number and a tensor's maximum; NaN wins, so that no comparison with a limit passes."""
    largest = float(values.max()) if values.numel() else 0.0
    return largest if math.isnan(largest) or largest > so_far else so_far


@contextmanager
def recording(rows: Mapping[str, LayerRow]) -> Iterator[Calls]:
    """Keep inputs and outputs of the layers and products of a trained model while the context lasts.

    Args:
        rows: the model's layers by name; the model runs in phase ``"round"``.
    """
    calls = Calls()
    running: list[str] = []
    with ExitStack() as stack:
        for name, row in rows.items():
            read: dict[str, nn.Module] = {**quantizers_at(name, row)} or {name: row.layer}
            for point, module in read.items():
                hook = _keep_input(calls.inputs[point])
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            batchnorm = None if row.input is None else row.batchnorm
            # First, as hooks of the user's that change an output come after the layer here and in files alike.
            kept = _keep_output(calls.outputs[name])
            stack.callback((batchnorm or row.layer).register_forward_hook(kept, prepend=True).remove)
            if not row.spec.is_product:
                _watch_weight(stack, calls, running, name, row, rows)
        yield calls
    for point, quantizer in points_of(rows).items():
        calls.codes[point] = [quantizer.codes(widened(x)) for x in calls.inputs[point]]


def _watch_weight(
    stack: ExitStack, calls: Calls, running: list[str], name: str, row: LayerRow, rows: Mapping[str, LayerRow]
) -> None:
    """Take note when the weight is made while none of the layers that have it is running."""
    owners = {other for other, its in rows.items() if its.weight is row.weight}

    def made(*_call: object) -> None:
        if owners.isdisjoint(running):
            calls.read_outside[name] = None

    stack.callback(row.layer.register_forward_pre_hook(lambda *_call: running.append(name)).remove)
    stack.callback(row.layer.register_forward_hook(lambda *_call: running.remove(name)).remove)
    stack.callback(row.weight.register_forward_hook(made).remove)


def _keep_input(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(first_tensor(args, kwargs).detach().clone())  # a later layer may overwrite it in place

    return hook


def _keep_output(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output.detach().clone())

    return hook


def points_of(rows: Mapping[str, LayerRow]) -> dict[str, InputQuantizer]:
    """Quantizers of inputs and operands by quantization point."""
    return {point: found for name, row in rows.items() for point, found in quantizers_at(name, row).items()}


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found


#: Modules that make whole codes.
CodesOf = DeployedLayer | DeployedKeptLayer | DeployedOperand
#: Inputs of a deployed layer or product: quantization point -> the module that makes whole codes of it, None if float.
Reads = dict[str, CodesOf | None]


def readers(deployed: nn.Module) -> dict[str, tuple[nn.Module, Reads]]:
    """Deployed layers and products by name, and the inputs of each."""
    found: dict[str, tuple[nn.Module, Reads]] = {}
    for name, layer in deployed_layers(deployed).items():
        quantized = layer if isinstance(layer, (DeployedLayer, DeployedKeptLayer)) else None
        found[name] = layer, {name: None if quantized is None or quantized.input_step is None else quantized}
    for name, product in deployed_products(deployed).items():
        found[name] = product, {operand_point(name, part): operand for part, operand in product.operands().items()}
    return found


def run_teacher_forced(
    deployed: nn.Module, trained: Calls, layers: dict[str, LayerComparison], run: Callable[[nn.Module], Any]
) -> None:
    """Run the deployed model with the trained inputs in all its layers and products, and compare them and its results.

    Args:
        deployed: the deployed model.
        trained: calls of the trained model in phase ``"round"``.
        layers: comparisons by quantization point, layer and product, and under :data:`RESULTS`; added to.
        run: calls a model on the batch.

    Raises:
        BrokenLayerError: if a deployed layer does not run; names it.
    """
    read: dict[str, int] = defaultdict(int)
    written: dict[str, int] = defaultdict(int)
    running: list[str] = []

    def forced(point: str, quantizer: CodesOf | None, arrived: Tensor) -> Tensor:
        """The trained input, or what arrived if there is none for this call."""
        call, layer = read[point], layers[point]
        read[point] += 1
        if call >= len(trained.inputs[point]) or trained.inputs[point][call].shape != arrived.shape:
            layer.calls_differ = True
            return arrived
        given = trained.inputs[point][call].to(arrived.device)
        layer.note_type(given)
        if quantizer is not None:
            layer.levels = quantizer.code_high - quantizer.code_low
            codes = trained.codes[point][call].to(arrived.device)
            layer.add_codes(codes, quantizer.codes(given), quantizer.codes(arrived))
        return given

    def before(reads: Reads) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
            running.append(next(iter(reads)))
            arrived = args[: len(reads)] or (first_tensor(args, kwargs),)
            given = [forced(point, quantizer, x) for (point, quantizer), x in zip(reads.items(), arrived, strict=True)]
            if args:
                return (*given, *args[len(reads) :]), kwargs
            return args, {key: given[0] if value is arrived[0] else value for key, value in kwargs.items()}

        return hook

    def after(name: str, output: Tensor) -> None:
        running.pop()
        call, layer = written[name], layers[name]
        written[name] += 1
        if call >= len(trained.outputs[name]) or trained.outputs[name][call].shape != output.shape:
            layer.calls_differ = True
            return
        layer.add_output(trained.outputs[name][call].to(output.device), output)

    with ExitStack() as stack:
        for name, (module, reads) in readers(deployed).items():
            for point in (*reads, name):
                layers.setdefault(point, LayerComparison())
            stack.callback(module.register_forward_pre_hook(before(reads), with_kwargs=True).remove)
            hook = module.register_forward_hook(
                lambda _module, _args, output, name=name: after(name, output), prepend=True
            )
            stack.callback(hook.remove)
        try:
            found = float_results(run(deployed))
        except Exception as error:
            if not running or isinstance(error, NipqError):
                raise
            raise BrokenLayerError(f"{running[-1]}: it does not run: {first_line(error)}") from error
    for point, expected in trained.inputs.items():
        layers.setdefault(point, LayerComparison()).calls_differ |= read[point] != len(expected)
    results = layers.setdefault(RESULTS, LayerComparison(tolerance=RESULT_TOLERANCE))
    results.half = max(layer.half for layer in layers.values())  # a model may return float32 of what it did in half
    _compare_results(trained, found, results)
    for layer in layers.values():
        layer.suspects |= trained.read_outside


def _compare_results(trained: Calls, found: list[Tensor], results: LayerComparison) -> None:
    if [tensor.shape for tensor in trained.results] != [tensor.shape for tensor in found]:
        results.calls_differ = True
        return
    for one, other in zip(trained.results, found, strict=True):
        each = LayerComparison()
        each.add_output(one, other)
        results.half = max(results.half, each.half)
        apart = each.error / each.largest if each.largest else each.error  # results may be of very different sizes
        results.error = apart if math.isnan(apart) else max(results.error, apart)
        results.largest = 1.0
