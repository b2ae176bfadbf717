"""Hessian-vector products, Hutchinson's trace of each tensor's block of the Hessian, and its top eigenvalue.

A true quantizer is a staircase: its second derivative is zero or infinite, and the gradient of the straight-through
estimator is not the derivative of anything, so a "Hessian of the quantized network" taken through it means nothing.
:func:`curvature` takes the Hessian of the float network *at the weights Q(w) that the quantized network computes with*:
quantizers are taken off a copy, its weights are replaced by the quantized ones, inputs are not quantized. It says how
fast the loss rises around the point where training ended. ``quantized=False`` takes the float weights instead, which is
the point where HAWQ (arXiv 1911.03852) decides how many bits a tensor needs. Batch norms use their running statistics,
and the loss is the mean over all samples given.

Needs the package curvlinops, which multiplies with the Hessian without forming it: ``pip install "nipq[analysis]"``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import relu6
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nipq.config import Phase
from nipq.errors import ConfigError, require
from nipq.functional.clipping import even_stride
from nipq.nn.kinds import is_supported, is_table
from nipq.nn.layers import float_weight, is_prepared
from nipq.prepare.batches import BatchReader, Inputs, call_model, copy_of, to_device
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import set_phase_, weight_table
from nipq.prepare.prepare import restore_

#: The loss of a batch from the model's outputs and the targets: a mean over the samples.
LossFn = Callable[[Any, Any], Tensor]

#: Up to this many parameters the Hessian is formed and its eigenvalues are those of the matrix.
DENSE = 64


@dataclass(frozen=True)
class Trace:
    """Hutchinson's estimate of the trace of one diagonal block of the Hessian.

    Attributes:
        trace: mean of v^T H v over probes v of random signs.
        error: standard error of that mean; 0 for a diagonal Hessian, infinite for a single probe.
        count: elements of the tensor (per sample, for an activation).
    """

    trace: float
    error: float
    count: int


@dataclass(frozen=True)
class Curvature:
    """Traces and the top eigenvalue of the Hessian of the mean loss.

    Attributes:
        tensors: by parameter name.
        total: of all these parameters together.
        eigenvalue: the largest (not the largest in size: negative curvature does not count).
        samples: number of samples that the loss is averaged over.
        probes: number of random probes of each trace.
        seed: of the probes and of the eigenvalue's first vector.
    """

    tensors: dict[str, Trace]
    total: Trace
    eigenvalue: float
    samples: int
    probes: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self)


def curvature(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    parameters: Sequence[str] | None = None,
    quantized: bool = True,
    probes: int = 32,
    tolerance: float = 1e-3,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> Curvature:
    """Trace of each tensor's block of the Hessian and the top eigenvalue; see the module for which Hessian.

    tr H = E[v^T H v] for independent random signs v (Hutchinson); one product H v serves all tensors, tensor q's
    estimate being v_q^T (H v)_q. The eigenvalue is Lanczos'.

    Args:
        model: prepared or float; not changed.
        batches: ``(inputs, targets)``, each read several times.
        loss_fn: of outputs and targets, a mean over samples, twice differentiable.
        parameters: names in the float network, such as ``"conv1.weight"``; every quantizable weight if left out.
        quantized: at the quantized weights; else at the float ones.
        probes: number of random vectors.
        tolerance: relative accuracy of the eigenvalue.
        seed: of the random vectors.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        The curvature.

    Raises:
        ConfigError: if a name is not a parameter, or there is no batch.
        MissingDependencyError: without curvlinops.
    """
    network = float_copy(model, quantized=quantized)
    chosen = stored_weights(network) if parameters is None else _named(network, parameters)
    tensors = list(chosen.values())
    data = labelled(batches, tensors[0].device, BatchReader(model, inputs, "curvature"))
    with differentiable(tensors):
        operator = hessian(network, data, loss_fn, tensors)
        draws = _probe(operator, tensors, probes, seed)
        eigenvalue = _top_eigenvalue(operator, tolerance, seed)
    counts = [tensor.numel() for tensor in tensors]
    return Curvature(
        {name: _estimate(values, n) for name, values, n in zip(chosen, draws, counts, strict=True)},
        _estimate(torch.stack(draws).sum(0), sum(counts)),
        eigenvalue,
        sum(batch.count for batch in data),
        probes,
        seed,
    )


def weight_traces(
    network: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    parameters: Mapping[str, nn.Parameter],
    *,
    probes: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> dict[str, Trace]:
    """Traces of the Hessian's blocks in chosen parameters of a float network in evaluation mode.

    Args:
        network: without quantizers.
        batches: ``(inputs, targets)``.
        loss_fn: of outputs and targets, a mean over samples.
        parameters: of the network, by any names.
        probes: number of random vectors.
        seed: of the random vectors.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        A trace for each name.
    """
    tensors = list(parameters.values())
    with differentiable(tensors):
        data = labelled(batches, tensors[0].device, BatchReader(network, inputs, "weight_traces"))
        operator = hessian(network, data, loss_fn, tensors)
        draws = _probe(operator, tensors, probes, seed)
    return {name: _estimate(values, p.numel()) for (name, p), values in zip(parameters.items(), draws, strict=True)}


def input_traces(
    network: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    layers: Mapping[str, nn.Module],
    *,
    probes: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
) -> dict[str, Trace]:
    """Mean over samples of the trace of one sample's Hessian in the input of each layer.

    The Hessian is taken in zeros that are added to the input; those of a layer that is called several times count
    together. (1/N) sum_n l_n has in them the blocks H_n / N, so its trace is the mean over samples.

    Args:
        network: without quantizers, in evaluation mode.
        batches: ``(inputs, targets)``.
        loss_fn: of outputs and targets, a mean over samples.
        layers: of the network, by any names.
        probes: number of random vectors for each batch.
        seed: of the random vectors.
        inputs: function from a batch to what the model is called with, where the form of ``prepare_``'s example inputs
            does not say it; see :class:`nipq.prepare.batches.BatchReader`.

    Returns:
        A trace for each layer that the batches reach.
    """
    draws: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    data = labelled(batches, next(network.parameters()).device, BatchReader(network, inputs, "input_traces"))
    total = sum(batch.count for batch in data)
    for place, batch in enumerate(data):
        shifted = _Shifted(network, layers, batch.inputs)
        shifts = list(shifted.shifts)
        try:
            found = _probe(hessian(shifted, [batch], loss_fn, shifts), shifts, probes, seed + place) if shifts else []
        finally:
            shifted.remove()
        counts.update(dict.fromkeys(shifted.owners, 0))
        for name, values, shift in zip(shifted.owners, found, shifts, strict=True):
            draws[name] = draws.get(name, 0) + values * (batch.count / total)
            counts[name] += shift.numel() // batch.count
    return {name: _estimate(values, counts[name]) for name, values in draws.items()}


class _Shifted(nn.Module):
    """A network with zeros, which are parameters, added to the input of each layer at each call."""

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], inputs: ExampleInputs) -> None:
        super().__init__()
        self.network = network
        self.shifts = nn.ParameterList()
        self.owners: list[str] = []
        self._recording, self._call = True, 0
        self._handles = [on_input(layer, self._shift(name)) for name, layer in layers.items()]
        with torch.no_grad():
            call_model(network, inputs)
        self._recording = False

    def _shift(self, name: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            if self._recording:
                self.shifts.append(nn.Parameter(torch.zeros_like(x)))
                self.owners.append(name)
                return x
            self._call += 1
            shift: Tensor = self.shifts[self._call - 1]
            return x + shift

        return change

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever the network takes and gives
        """The network on shifted inputs; calls come in the order in which they were recorded."""
        self._call = 0
        return self.network(*args, **kwargs)

    def remove(self) -> None:
        """Take the shifts off the network."""
        for handle in self._handles:
            handle.remove()


def _probe(operator: Any, parameters: Sequence[Tensor], probes: int, seed: int) -> list[Tensor]:  # noqa: ANN401
    """v_q^T (H v)_q of each tensor for each probe, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(probes):
        signs = [(torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p) for p in parameters]
        products = operator @ signs
        rows.append([float((v.double() * hv.double()).sum()) for v, hv in zip(signs, products, strict=True)])
    return list(torch.tensor(rows, dtype=torch.float64).T)


def _estimate(values: Tensor, count: int) -> Trace:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")
    return Trace(float(values.mean()), error, count)


def _top_eigenvalue(operator: Any, tolerance: float, seed: int) -> float:  # noqa: ANN401
    from scipy.sparse.linalg import eigsh  # here, as scipy is slow to import

    size = operator.shape[0]
    if size <= DENSE:
        matrix = operator @ torch.eye(size, dtype=operator.dtype, device=operator.device)
        return float(torch.linalg.eigvalsh((matrix + matrix.T).double() / 2)[-1])
    start = np.random.default_rng(seed).standard_normal(size)
    found = eigsh(operator.to_scipy(), k=1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(found[0])


def _named(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    known = dict(network.named_parameters())
    missing = [name for name in names if name not in known]
    if missing or not names:
        raise ConfigError(
            f"curvature: expected names of the float network's parameters, found {missing or 'none'}. "
            f"Correct them; there are {', '.join(list(known)[:5])}{', ...' if len(known) > 5 else ''}."
        )
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class LabelledBatch:
    """Inputs, targets and number of samples of a batch.

    Attributes:
        inputs: arguments of the network.
        targets: second argument of the loss.
        count: number of samples.
    """

    inputs: ExampleInputs
    targets: Any
    count: int


def labelled(batches: Iterable[Any], device: torch.device, reader: BatchReader) -> list[LabelledBatch]:
    """Read batches.

    Args:
        batches: inputs and targets, see :class:`~nipq.prepare.batches.BatchReader`.
        device: where they are wanted.
        reader: finds them in a batch.

    Returns:
        All of them.

    Raises:
        ConfigError: if there is none, or one without targets.
    """
    found = []
    for where, batch in reader.read(batches):
        inputs = reader.inputs(batch, where)
        targets = to_device(reader.targets(batch, where), device)
        found.append(LabelledBatch(to_device(inputs, device), targets, reader.samples(inputs)))
    return found


def hessian(
    network: nn.Module, data: Sequence[LabelledBatch], loss_fn: LossFn, parameters: Sequence[nn.Parameter]
) -> Any:  # noqa: ANN401 -- curvlinops has no types
    """The Hessian of the loss, averaged over all samples, in some parameters, as a linear operator.

    Args:
        network: in evaluation mode, without quantizers.
        data: all samples.
        loss_fn: of outputs and targets, a mean over the samples of a batch, twice differentiable.
        parameters: of the network; they must ask for gradients, see :func:`differentiable`.

    Returns:
        A ``curvlinops`` operator: ``operator @ vector``, ``operator @ [tensor, ...]``, ``operator.to_scipy()``.

    Raises:
        MissingDependencyError: without curvlinops.
    """
    curvlinops = _curvlinops()

    class Hessian(curvlinops.HessianLinearOperator):  # type: ignore[misc, name-defined]  # found at run time
        """curvlinops' operator with the product of one batch by plain double backward.

        Its own goes through functional transforms, which are slower on grouped convolutions and refuse some models.
        """

        def _matmat_batch(self, batch: LabelledBatch, _target: Tensor, columns: list[Tensor]) -> list[Tensor]:
            # fused attention has no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _HardSigmoidByReLU6():
                loss = loss_fn(call_model(network, batch.inputs), batch.targets)
                return _products(loss, parameters, columns)

    return Hessian(
        network,
        _Mean(),
        list(parameters),
        [(batch, torch.zeros(())) for batch in data],
        check_deterministic=False,
        batch_size_fn=lambda batch: batch.count,
    )


class _HardSigmoidByReLU6(TorchFunctionMode):
    """Computes hard sigmoids, whose second derivative torch does not have, as the same function relu6(x + 3) / 6."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        if function is torch.nn.functional.hardsigmoid:
            x = args[0] if args else (kwargs or {})["input"]
            return relu6(x + 3) / 6
        return function(*args, **(kwargs or {}))


class _Mean:
    """Stand-in for curvlinops' loss function, averaged over the samples of a batch."""

    reduction = "mean"


def _products(loss: Tensor, parameters: Sequence[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """H v for each of several v, which are stacked along the last axis."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    results = []
    for column in zip(*(stack.unbind(-1) for stack in columns), strict=True):
        slope = torch.stack([(g * v).sum() for g, v in zip(gradients, column, strict=True)]).sum()
        if slope.requires_grad:
            found = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
        else:  # the loss is linear in them
            found = tuple(torch.zeros_like(v) for v in column)
        results.append(found)
    return [torch.stack(parts, -1) for parts in zip(*results, strict=True)]


def _curvlinops() -> ModuleType:
    with warnings.catch_warnings():
        # One of its own dependencies is compiled on import by torch.jit, which torch has deprecated.
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        return require("curvlinops", extra="analysis", purpose="products with the Hessian")


def is_quantized(model: nn.Module) -> bool:
    """Return whether ``prepare_`` has changed any layer of the model."""
    return any(is_prepared(module) for module in model.modules())


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights and inputs are measured, by name: the quantized ones, or all that could be.

    Args:
        model: prepared or not.

    Returns:
        Convolutions and linear layers in the order of their registration.
    """
    quantized = is_quantized(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_supported(module) and not is_table(module) and (is_prepared(module) or not quantized)
    }


def stored_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The float weight of each layer, as the optimizer sees it; a shared one once.

    Args:
        model: prepared or not.

    Returns:
        Parameters by ``"<layer>.weight"``.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, layer in layers(model).items():
        weight = float_weight(layer)
        found.setdefault(id(weight), (f"{name}.weight".lstrip("."), weight))
    return dict(found.values())


@torch.no_grad()
def float_copy(model: nn.Module, *, quantized: bool = True) -> nn.Module:
    """A copy of the network without quantizers, in evaluation mode, no parameter of which asks for gradients.

    Args:
        model: prepared or not; not changed.
        quantized: the copy's weights are Q(w), those that the prepared model computes with; else its float weights.

    Returns:
        The copy; inputs are not quantized in it.
    """
    copied = copy_of(model).eval().requires_grad_(False)
    if not is_quantized(copied):
        return copied
    set_phase_(copied, Phase.ROUND if quantized else Phase.FLOAT)
    rows = weight_table(copied)
    values = [weight(float_weight(row.layer)).clone() for row, weight in rows]
    restore_(copied)
    for (row, _), value in zip(rows, values, strict=True):
        float_weight(row.layer).copy_(value)
    return copied


@contextmanager
def differentiable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters ask for gradients meanwhile."""
    before = [(p, p.requires_grad) for p in parameters]
    for p, _ in before:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def on_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Let a function see and replace the first tensor that a module is called with.

    Args:
        module: any; for a quantized layer the function gets the quantized input.
        change: from the input to what the module computes with.

    Returns:
        A handle whose ``remove`` ends it.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def input_samples(modules: Mapping[str, nn.Module], run: Callable[[], object], most: int) -> dict[str, Tensor]:
    """An evenly spaced sample of the inputs of each module.

    Args:
        modules: by name.
        run: whatever calls them, such as a forward of the network.
        most: values kept of each call, about.

    Returns:
        One vector for each module that was called, its calls one after the other.
    """
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            flat = x.detach().flatten()
            kept.setdefault(name, []).append(flat[:: even_stride(flat.numel(), most)].clone())
            return x

        return change

    handles = [on_input(module, keep(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}
