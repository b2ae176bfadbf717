"""Second derivatives of the loss: Hutchinson's trace of each tensor, and the top eigenvalue.

What is measured. A true quantizer is a staircase: its second derivative is zero or infinite, and the straight-through
gradient that training uses is not the derivative of anything, so a "Hessian of the quantized network" taken through it
means nothing. Here it is the Hessian of the float network *at the weights Q(w) that the quantized network computes
with*: quantizers are taken off a copy, its weights are replaced by the quantized ones, inputs are not quantized. It
says how fast the loss rises around the point where training ended. ``quantized=False`` takes the float weights instead,
which is the point where HAWQ (arXiv 1911.03852) decides how many bits a tensor needs. Batch norms use their running
statistics, and the loss is the mean over all samples given.

Needs the package curvlinops, which multiplies with the Hessian without forming it: ``pip install "nipq[analysis]"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nipq.analysis.hessian import hessian, labelled
from nipq.analysis.network import LossFn, differentiable, float_twin, on_input, stored_weights
from nipq.errors import ConfigError
from nipq.prepare.trace import ExampleInputs, call_model

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

    Returns:
        The curvature.

    Raises:
        ConfigError: if a name is not a parameter, or there is no batch.
        MissingDependencyError: without curvlinops.
    """
    network = float_twin(model, quantized=quantized)
    chosen = stored_weights(network) if parameters is None else _named(network, parameters)
    tensors = list(chosen.values())
    data = labelled(batches, tensors[0].device)
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
) -> dict[str, Trace]:
    """Traces of the Hessian's blocks in chosen parameters of a float network in evaluation mode.

    Args:
        network: without quantizers.
        batches: ``(inputs, targets)``.
        loss_fn: of outputs and targets, a mean over samples.
        parameters: of the network, by any names.
        probes: number of random vectors.
        seed: of the random vectors.

    Returns:
        A trace for each name.
    """
    tensors = list(parameters.values())
    with differentiable(tensors):
        operator = hessian(network, labelled(batches, tensors[0].device), loss_fn, tensors)
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

    Returns:
        A trace for each layer that the batches reach.
    """
    draws: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    data = labelled(batches, next(network.parameters()).device)
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
