"""Ways to train a network, one training step each: float, this library's, and its peers'."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nipq
from benchmarks import peers
from benchmarks.networks import Network
from benchmarks.plain import plain_operations
from nipq.qat.search import Search

#: Small, so that hundreds of steps on one batch leave all numbers where they were.
RATE = 1e-4
STEPS = 10_000


def _no_penalty() -> Tensor | float:
    return 0.0


def _nothing() -> None:
    return None


@dataclass
class Training:
    """A network in training.

    Attributes:
        model: what is trained.
        inputs: of every step.
        labels: of every step.
        optimizer: of all parameters.
        penalty: what is added to the loss.
        after: what follows the optimizer's step.
        within: what a step runs inside of.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    optimizer: torch.optim.Optimizer
    penalty: Callable[[], Tensor | float] = _no_penalty
    after: Callable[[], None] = _nothing
    within: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)

    def loss(self) -> Tensor:
        """Forward."""
        with self.within():
            return cross_entropy(self.model(self.inputs), self.labels) + self.penalty()

    def step(self) -> None:
        """Forward, backward, optimizer, and what the method does after it."""
        self.loss().backward()  # type: ignore[no-untyped-call]  # torch gives it no type
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after()


Make = Callable[[nn.Module, Tensor, Tensor], Training]


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def _float(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
    return Training(model, inputs, labels, _sgd(model))


def _own(*, plain: bool = False, **settings: Any) -> Make:  # noqa: ANN401 -- fields of Config
    """This library: 4 bits on average, found by a search, or fixed."""

    def make(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
        nipq.prepare_(model, inputs[:1], nipq.Config(**settings))
        nipq.calibrate_(model, [inputs], batches=1)
        model.train()
        optimizer = torch.optim.SGD(nipq.param_groups(model, lr=RATE), momentum=0.9)
        training = Training(model, inputs, labels, optimizer, within=plain_operations if plain else nullcontext)
        if "weight_bits" not in settings:
            search = Search(model, nipq.AverageBits(weights=4, activations=4), STEPS, optimizer=optimizer)
            training.penalty, training.after = search.penalty, search.step
        return training

    return make


def _torch(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
    return _float(peers.torch_learnable(model, inputs), inputs, labels)


def _brevitas(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
    return _float(peers.brevitas(model, inputs), inputs, labels)


def _diffq(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
    training = _float(model, inputs, labels)
    size = peers.diffq(model, training.optimizer)
    training.penalty = lambda: 1e-3 * size()
    return training


def _relu_kept(model: nn.Module, inputs: Tensor, labels: Tensor) -> Training:
    """A watched ReLU is not folded into the quantizer behind it."""
    training = _own()(model, inputs, labels)
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.register_forward_hook(lambda *_: None)
    return training


FLOAT, UNIFORM, EMPIRICAL, UNFOLDED = "float", "nipq", "nipq, empirical noise", "nipq, ReLU not folded"
LSQ: dict[str, Any] = {"method": "lsq", "weight_bits": 4, "activation_bits": 4}
OWN: dict[str, Make] = {
    FLOAT: _float,
    UNIFORM: _own(),
    UNFOLDED: _relu_kept,
    EMPIRICAL: _own(noise="empirical"),
    "nipq, plain operations": _own(plain=True),
    "lsq": _own(**LSQ),
    "lsq, plain operations": _own(plain=True, **LSQ),
}
PEERS: dict[str, Make] = {
    "torch learnable fake-quant": _torch,
    "Brevitas": _brevitas,
    "DiffQ, weights only": _diffq,
}
VARIANTS = OWN | PEERS


def prepared(variant: str, network: Network, layout: str, seed: int = 0) -> Training:
    """A network in training: the same weights and data for every variant.

    Args:
        variant: a name of ``VARIANTS``.
        network: what to train.
        layout: memory format.
        seed: of weights and data.

    Raises:
        MissingDependencyError: if a peer is not installed.
    """
    torch.manual_seed(seed)
    model = network.build().train()
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    inputs, labels = network.data(layout)
    _settle(model, inputs)
    return VARIANTS[variant](model, inputs, labels)


@torch.no_grad()
def _settle(model: nn.Module, inputs: Tensor) -> None:
    """Let batch norms know the data, so that clipping ranges started in evaluation mode are right in training mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
