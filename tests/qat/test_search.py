"""The search inside a training loop."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits, BitOps, ModelSize
from nipq.config import Config
from nipq.errors import BudgetError, ConfigError, NonFiniteError, OrderError
from nipq.prepare.layer_table import layer_table, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.search import Search

X = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


def net(config: Config | None = None) -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    model = prepare_(nn.Sequential(*layers), X[:1], config or Config())
    return calibrate_(model, [X])


def train(model: nn.Module, search: Search, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        (cross_entropy(model(X), Y) + search.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()


def test_the_loop_brings_every_limit_within_one_per_cent() -> None:
    model = net()
    budget = AverageBits(weights=4, activations=3.5, mode="target") & BitOps("60 k")
    search = Search(model, budget, total_steps=150)
    train(model, search, torch.optim.Adam(param_groups(model, lr=1e-2, bits_lr=2e-2), lr=1e-2), 150)
    weights, activations, operations = search.distance().values()
    assert weights["soft"] == pytest.approx(4, rel=0.01)
    assert activations["soft"] == pytest.approx(3.5, rel=0.01)
    assert operations["soft"] < 60_000 * 1.01
    assert weights["relative"] == weights["rounded"] / 4 - 1


def test_rounded_bits_end_within_one_layers_granularity_of_the_target() -> None:
    """T14: what evaluation uses is off by no more than the largest tensor's share of one bit."""
    model = net()
    search = Search(model, AverageBits(weights=4, activations=4, mode="target"), total_steps=300)
    train(model, search, torch.optim.Adam(param_groups(model, lr=1e-2), lr=1e-2), 300)
    rows = layer_table(model)
    counts = {
        "average weight bits": [row.spec.weight_count for row in rows],
        "average activation bits": [row.spec.activation_count for row in rows if not row.spec.is_input],
    }
    for name, found in search.distance().items():
        assert abs(found["rounded"] - 4) <= max(counts[name]) / sum(counts[name])


def test_only_bit_parameters_get_a_gradient_and_every_one_does() -> None:
    for kind in ("controller", "paper"):
        model = net()
        search = Search(model, BitOps("20 k"), total_steps=10, penalty=kind)
        search.step()
        search.penalty().backward()
        with_gradient = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient == {"bit_raw"}
        assert all(q.bit_raw.grad.item() > 0 for q in quantizers(model) if not q.is_frozen)


def test_the_published_penalty_is_a_huber_function_of_rounded_totals() -> None:
    model = net()
    for row in layer_table(model):
        nn.init.constant_(row.weight.bit_raw, 0.2)  # 5.3 bits, rounded to 5
    counts = [36, 216, 72]
    search = Search(model, AverageBits(weights=4, mode="target"), total_steps=10, penalty="paper")
    penalty = search.penalty()
    assert penalty.item() == pytest.approx((sum(counts) - 0.5) / 2**23)  # one bit too many each; beta 1
    penalty.backward()
    for row, count in zip(layer_table(model), counts, strict=True):
        slope = torch.autograd.grad(row.weight.bits.sum(), row.weight.bit_raw)[0]
        torch.testing.assert_close(row.weight.bit_raw.grad, count / 2**23 * slope)


def test_the_published_penalties_of_operations_and_bytes_have_their_constants() -> None:
    model = net()  # 5 bits everywhere, 8 for the image
    operations = 576 * 5 * 8 + 864 * 25 + 72 * 25
    found = Search(model, BitOps(20_000), 10, penalty="paper").penalty().item()
    assert found == pytest.approx(3 * 0.5 * ((operations - 20_000) / 1e9) ** 2)
    search = Search(model, ModelSize(1600, mode="target"), 10, penalty="paper")
    (size,) = search.distance().values()
    assert search.penalty().item() == pytest.approx((8 * abs(size["rounded"] - 1600) - 0.5) / 2**23)


def test_a_published_bound_counts_only_what_is_above() -> None:
    model = net()
    assert Search(model, AverageBits(weights=6), 10, penalty="paper").penalty().item() == 0
    assert Search(model, AverageBits(weights=6, mode="target"), 10, penalty="paper").penalty().item() > 0


def test_resuming_gives_the_same_numbers_as_not_stopping() -> None:
    def run(stop: int | None) -> list[float]:
        torch.manual_seed(3)
        model = net()
        budget = AverageBits(weights=4, activations=4)
        optimizer = torch.optim.SGD(param_groups(model, lr=0.04), lr=0.04, momentum=0.9)
        search = Search(model, budget, total_steps=12)
        train(model, search, optimizer, stop or 12)
        if stop:
            file = io.BytesIO()
            torch.save(search.state_dict(), file)
            file.seek(0)
            search = Search(model, budget, total_steps=99)
            search.load_state_dict(torch.load(file, weights_only=True))
            train(model, search, optimizer, 12 - stop)
        return [q.bits.item() for q in quantizers(model)]

    assert run(None) == run(5)


def test_a_state_of_other_limits_is_refused() -> None:
    model = net()
    state = Search(model, AverageBits(weights=4), 10).state_dict()
    with pytest.raises(ConfigError, match=r"limits \['bit-operations'\], found \['average weight bits'\]"):
        Search(model, BitOps("1 M"), 10).load_state_dict(state)


def test_fixed_bits_are_honoured_and_all_fixed_costs_nothing() -> None:
    model = net(Config(weight_bits=4, activation_bits=4))
    search = Search(model, AverageBits(weights=4, activations=4), 10)
    assert not search.penalty().requires_grad
    search.step()


def test_the_range_is_known_and_impossible_budgets_are_refused_at_once() -> None:
    model = net()
    search = Search(model, AverageBits(weights=4), 10)
    assert (search.feasible[0].low, search.feasible[0].high) == (2, 8)
    assert "average weight bits <= 4 bit, possible 2 to 8 bit" in repr(search)
    with pytest.raises(BudgetError, match="within 2 to 8 bit"):
        Search(model, AverageBits(weights=1), 10)
    with pytest.raises(ConfigError, match="expected penalty 'controller' or 'paper', found 'huber'"):
        Search(model, AverageBits(weights=4), 10, penalty="huber")  # type: ignore[arg-type]


def test_an_optimizer_without_the_quantizers_is_refused() -> None:
    model = net()
    early = torch.optim.SGD([model[0].bias], lr=0.1)
    with pytest.raises(OrderError, match="it lacks"):
        Search(model, AverageBits(weights=4), 10, optimizer=early)
    Search(model, AverageBits(weights=4), 10, optimizer=torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1))


def test_bits_that_are_not_finite_are_named() -> None:
    model = net()
    search = Search(model, AverageBits(weights=4), 10)
    nn.init.constant_(layer_table(model)[1].weight.bit_raw, float("nan"))
    for call in (search.penalty, search.step, search.distance):
        with pytest.raises(NonFiniteError, match=r"2\.weight: expected a finite bit-width"):
            call()


def test_bits_that_no_optimizer_moves_are_noticed() -> None:
    """Built before the model was prepared: weights learn, and nobody would see that bits do not."""
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    model = nn.Sequential(*layers)
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    calibrate_(prepare_(model, X[:1]), [X])
    with pytest.raises(OrderError, match="that moves the bit-widths, found them where they were 20 steps ago"):
        train(model, Search(model, AverageBits(weights=4), 50), early, 21)


def test_steps_past_the_end_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    search = Search(model, AverageBits(weights=4), 3)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1), lr=0.1)
    train(model, search, optimizer, 3)
    assert not caplog.messages
    train(model, search, optimizer, 3)
    assert [message for message in caplog.messages if "more often than total_steps=3" in message] == caplog.messages
    assert len(caplog.messages) == 1
