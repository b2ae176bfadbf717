"""A network with two inputs and a target: every function that reads a loader takes the training batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import nipq
from nipq.budget.allocate import allocate_bits_
from nipq.budget.hessian import curvature
from nipq.errors import ConfigError
from nipq.prepare.layer_table import quantizers
from nipq.qat.batchnorm import reestimate_bn_, reestimate_bn_if_better_
from nipq.qat.session import QATSession, calibrate_and_allocate_

GENERATOR = torch.Generator().manual_seed(0)
LEFT, RIGHT = (torch.randn(12, n, generator=GENERATOR) for n in (4, 3))
Y = torch.arange(12) % 2
BUDGET = nipq.AverageBits(weights=4, activations=4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm, self.head = (
            nn.Linear(4, 6),
            nn.Linear(3, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 2),
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.left(left) + self.right(right))))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nipq.prepare_(Net(), (LEFT[:1], RIGHT[:1]))


def swapped(batch: Any) -> Any:
    """Inputs of a batch (y, (right, left))."""
    return batch[1][1], batch[1][0]


FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flat": ([LEFT, RIGHT, Y], {}),
    "nested": (((LEFT, RIGHT), Y), {}),
    "named": ({"left": LEFT, "right": RIGHT, "labels": Y, "id": 3}, {}),
    "said": ((Y, (RIGHT, LEFT)), {"inputs": swapped}),
}


def run(form: str) -> dict[str, Any]:
    """Numbers of every function on batches of a form."""
    batch, settings = FORMS[form]
    loader, model, found = [batch], net(), {}
    nipq.calibrate_(model, loader, **settings)
    found["noise"] = allocate_bits_(model, loader, BUDGET, cross_entropy, **settings)
    found["unlabelled"] = allocate_bits_(model, loader, BUDGET, **settings)
    found["norms"] = reestimate_bn_(model, loader, **settings).to_dict()
    found["choice"] = reestimate_bn_if_better_(model, loader, loader, **settings).to_dict()
    nipq.freeze_bits_(model, BUDGET)
    deployed = nipq.convert(model.eval())
    found["verify"] = [check.numbers for check in nipq.verify(model, deployed, loader=loader, **settings).checks]
    torch.manual_seed(1)
    result = nipq.quantize(Net(), loader, BUDGET, loss_fn=cross_entropy, epochs=1, **settings)
    found["quantize"] = [stage.distance for stage in result.report.stages]
    model = net()
    optimizer = torch.optim.SGD(nipq.param_groups(model), lr=0.01)
    session = QATSession(model, BUDGET, 2, loader=loader, loss_fn=cross_entropy, optimizer=optimizer, **settings)
    for _ in range(2):
        torch.manual_seed(2)
        (cross_entropy(model(LEFT, RIGHT), Y) + session.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        session.step()
    session.finish()
    return found | {"session": session.bits, "sensitivity": session.sensitivity}


def test_every_form_gives_the_same_numbers() -> None:
    expected = run("flat")
    assert expected["verify"][2]["accuracy_trained"] == expected["verify"][2]["accuracy_deployed"]
    for form in ("nested", "named", "said"):
        assert run(form) == expected


def test_curvature_and_its_bits_take_every_form_too() -> None:
    pytest.importorskip("curvlinops")
    found = []
    for batch, settings in FORMS.values():
        model = nipq.calibrate_(net(), [batch], **settings)
        curved = curvature(model, [batch], cross_entropy, probes=2, **settings).to_dict()
        allocate_bits_(model, [batch], BUDGET, cross_entropy, method="hawq", **settings)
        found.append((curved, [quantizer.bits_rounded for quantizer in quantizers(model)]))
    assert found[1:] == found[:1] * 3


def test_labels_out_of_range_are_named_before_training() -> None:
    optimizer_of = lambda model: torch.optim.SGD(nipq.param_groups(model), lr=0.01)  # noqa: E731
    model = net()
    with pytest.raises(ConfigError, match=r"allocate_bits_, batch 1: loss_fn: .*int64 \[12\] with values from 0 to 7"):
        QATSession(
            model, BUDGET, 2, loader=[(LEFT, RIGHT, Y), (LEFT, RIGHT, torch.where(Y == 1, 7, Y))],
            loss_fn=cross_entropy, optimizer=optimizer_of(model),
        )  # fmt: skip


def test_loaders_that_end_after_one_pass_are_refused_where_several_are_made() -> None:
    model, batch = net(), FORMS["flat"][0]
    with pytest.raises(ConfigError, match="calibrate_and_allocate_: expected a loader that can be read several times"):
        calibrate_and_allocate_(model, iter([batch]), BUDGET)
    nipq.calibrate_(model, iter([batch]))  # one pass
    with pytest.raises(ConfigError, match="allocate_bits_: expected a loader that can be read several times"):
        allocate_bits_(model, iter([batch]), BUDGET, rounds=2)
    with pytest.raises(ConfigError, match="reestimate_bn_if_better_: expected a loader that can be read several times"):
        reestimate_bn_if_better_(model, iter([batch]), [batch])
