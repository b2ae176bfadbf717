from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.errors import ConfigError, OrderError
from nipq.nn.layers import weight_quantizer
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.qat.oscillation import ANNEAL_FROM, FREEZE_START, MOMENTUM, OSCILLATING, Oscillations


def layer_of(weight: Tensor, **settings: Any) -> nn.Linear:
    """A linear layer with this weight, shape (outputs, inputs); signed 3 bits, alpha 3, so that the step is 1."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    config = nipq.Config(weight_bits=3, quantize_inputs=False, **settings)
    nipq.prepare_(layer, torch.zeros(1, weight.shape[1]), config)
    weight_quantizer(layer).set_alpha_(torch.tensor(3.0))
    set_phase_(layer, "round")
    return layer


def latent(layer: nn.Module) -> Tensor:
    found = layer.parametrizations.weight.original
    assert isinstance(found, nn.Parameter)
    return found


def feed(oscillations: Oscillations, layer: nn.Module, weights: list[list[float]]) -> None:
    """Let the weight take these values, one a step."""
    for values in weights:
        latent(layer).data.copy_(torch.tensor([values]))
        oscillations.step()


def history(oscillations: Oscillations, key: str) -> Tensor:
    (only,) = oscillations.state_dict()["history"].values()
    return only[key]


# ---------------------------------------------------------------------- frequency


def test_frequency_of_known_sequences() -> None:
    """Every step back and forth, every second step, steadily upward, and at rest."""
    layer = layer_of(torch.zeros(1, 4))
    oscillations = Oscillations(layer, 100)
    steps, m = 60, MOMENTUM
    slow = [0.9, 1.1, 0.4, -0.4]  # codes 1, 1, 0, 0
    feed(oscillations, layer, [[0.6 if t % 2 == 0 else 0.4, slow[t % 4], 3 * t / steps, 0.2] for t in range(steps)])
    swings = steps - 1  # the first change has nothing to be opposite to
    expected = [
        1 - (1 - m) ** swings,
        # oscillates at t = 2, 4, .., 58, after which 59 - t steps are left
        m * sum((1 - m) ** (steps - 1 - t) for t in range(2, steps, 2)),
        0.0,
        0.0,
    ]
    torch.testing.assert_close(history(oscillations, "frequency"), torch.tensor([expected]))
    assert oscillations.frequency() == {weight_quantizer(layer).name: 0.5}
    assert expected[1] > OSCILLATING
    assert oscillations.frozen() == {weight_quantizer(layer).name: 0.0}


def test_a_jump_over_several_codes_counts_once_and_truncation_hides_movement() -> None:
    layer = layer_of(torch.zeros(1, 2))
    oscillations = Oscillations(layer, 10, momentum=1.0)  # then the frequency is o itself
    feed(oscillations, layer, [[3.0, 5.0], [-3.0, 9.0]])
    assert history(oscillations, "frequency").tolist() == [[1.0, 0.0]]
    feed(oscillations, layer, [[-3.0, 4.0], [-2.0, -9.0]])
    assert history(oscillations, "frequency").tolist() == [[1.0, 1.0]]


def test_watching_changes_nothing() -> None:
    layer = layer_of(torch.zeros(1, 2))
    oscillations = Oscillations(layer, 4)
    feed(oscillations, layer, [[0.6, 0.3], [0.4, 0.3], [0.6, 0.3], [0.4, 0.3]])
    assert latent(layer).tolist() == [[pytest.approx(0.4), pytest.approx(0.3)]]
    assert oscillations.penalty().item() == 0


def test_another_bit_width_starts_the_history_anew() -> None:
    layer = layer_of(torch.zeros(1, 1))
    oscillations = Oscillations(layer, 8, freeze=0.01, momentum=0.5)
    feed(oscillations, layer, [[0.6], [0.4], [0.6], [0.4]])
    assert history(oscillations, "frozen").all()
    weight_quantizer(layer).freeze_bits_(4)  # step 3 / 7
    feed(oscillations, layer, [[2.0]])
    assert history(oscillations, "codes").tolist() == [[5.0]]
    assert not history(oscillations, "frozen").any()
    assert history(oscillations, "frequency").item() == 0


def test_tied_weights_are_watched_once() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    nipq.prepare_(model, torch.zeros(1, 3))
    nipq.calibrate_(model, [torch.randn(8, 3)])
    assert len(Oscillations(model, 1).frequency()) == 1


# ---------------------------------------------------------------------- dampening


def test_dampening_gradient_is_the_closed_form() -> None:
    """2 lambda (w - Q(w)) in range, 0 outside; nothing for the boundary."""
    weight = torch.tensor([[-4.0, -2.7, 0.2, 0.5, 1.4, 2.9, 7.0]])
    layer = layer_of(weight)
    oscillations = Oscillations(layer, 1, dampen=0.3)
    assert oscillations.penalty().item() == 0  # lambda starts at 0
    oscillations.step()
    penalty = oscillations.penalty()
    penalty.backward()
    error = torch.tensor([[0.0, 0.3, 0.2, 0.5, 0.4, -0.1, 0.0]])
    torch.testing.assert_close(penalty, 0.3 * (error**2).sum())
    torch.testing.assert_close(latent(layer).grad, 0.6 * error)
    assert weight_quantizer(layer).alpha_raw.grad is None


def test_dampening_adds_up_over_tensors_and_channels() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2))
    nipq.prepare_(model, torch.zeros(1, 2, 4, 4), nipq.Config(granularity="channel", weight_bits=3))
    nipq.calibrate_(model, [torch.randn(4, 2, 4, 4)])
    set_phase_(model, "round")
    oscillations = Oscillations(model, 1, dampen=2.0)
    oscillations.step()
    errors = []
    for row in layer_table(model):
        weight, quantized = latent(row.layer), row.layer.weight
        end = row.weight.alpha.detach().reshape(-1, *[1] * (weight.ndim - 1))
        errors.append((weight.clamp(-end, end) - quantized).square().sum())
    torch.testing.assert_close(oscillations.penalty(), 2.0 * torch.stack(errors).sum())


def test_both_schedules_are_half_a_cosine_after_a_quarter_of_the_steps() -> None:
    layer = layer_of(torch.full((1, 1), 0.25))
    oscillations = Oscillations(layer, 400, dampen=1.0, freeze=0.02)
    for calls, share in {0: 0.0, 100: 0.0, 175: 0.5 - math.sqrt(0.125), 250: 0.5, 400: 1.0, 500: 1.0}.items():
        oscillations.load_state_dict(oscillations.state_dict() | {"calls": calls})
        assert oscillations.penalty().item() == pytest.approx(share * 0.25**2, abs=1e-8)
        threshold = FREEZE_START + share * (0.02 - FREEZE_START) if calls >= ANNEAL_FROM * 400 else math.inf
        assert oscillations._threshold() == pytest.approx(threshold)


# ---------------------------------------------------------------------- freezing


def test_a_weight_is_frozen_at_its_mean_code() -> None:
    """Three of four steps at code 1; the mean is of about the last 1 / m steps."""
    layer = layer_of(torch.ones(1, 2))
    oscillations = Oscillations(layer, 400, freeze=0.05)
    swing = [[0.6, 1.0], [0.6, 1.0], [0.6, 1.0], [0.4, 1.0]]  # half of the steps change the code, all of them back
    feed(oscillations, layer, (swing * 25)[:99])
    assert not history(oscillations, "frozen").any()  # not in the first quarter
    feed(oscillations, layer, swing * 10)
    assert history(oscillations, "frozen").tolist() == [[True, False]]
    feed(oscillations, layer, [[0.4, -1.0]])
    assert latent(layer).tolist() == [[pytest.approx(1.0), -1.0]]
    assert oscillations.frozen() == {weight_quantizer(layer).name: 0.5}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_frozen_code_stays_while_the_step_goes_on_learning(granularity: str) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.tensor([[0.4, -2.6, 2.4], [1.4, 0.3, -0.2]]), granularity=granularity)
    optimizer = torch.optim.Adam(nipq.param_groups(layer, lr=0.05, weight_decay=0.1))
    oscillations = Oscillations(layer, 10, freeze=0.01, momentum=0.5)
    for sign in (1, -1, 1, -1, 1, -1):
        latent(layer).data.add_(0.2 * sign * torch.tensor([[1.0, 1, 1], [1, 0, 0]]))
        oscillations.step()
    frozen, codes = history(oscillations, "frozen"), history(oscillations, "codes")
    assert frozen.tolist() == [[True, True, True], [True, False, False]]
    free, alpha = latent(layer).detach().clone(), weight_quantizer(layer).alpha.detach().clone()
    pulled = torch.zeros_like(frozen)
    for _ in range(30):
        optimizer.zero_grad()
        ((layer.weight - torch.tensor([[9.0, 9, -9], [-9, 2.6, -2.6]])) ** 2).sum().backward()
        pulled |= latent(layer).grad != 0
        optimizer.step()
        oscillations.step()
        now = weight_quantizer(layer).codes(latent(layer).detach())
        assert torch.equal(now[frozen], codes[frozen])
        step = weight_quantizer(layer).step().reshape(-1, 1)
        assert torch.equal(layer.weight[frozen], (codes * step)[frozen])
    assert pulled[frozen].all()
    assert not torch.equal(now[~frozen], codes[~frozen])
    assert not torch.equal(latent(layer)[~frozen], free[~frozen])
    assert (weight_quantizer(layer).alpha - alpha).abs().min() > 0.1


def test_a_frozen_weight_of_an_outer_bin_lies_inside_the_range() -> None:
    layer = layer_of(torch.tensor([[3.0]]))
    oscillations = Oscillations(layer, 8, freeze=0.01, momentum=0.5)
    feed(oscillations, layer, [[2.4], [2.6], [2.4], [2.6], [2.6], [2.6], [2.6]])
    assert history(oscillations, "frozen").all()
    code = history(oscillations, "codes").item()
    assert code in (2.0, 3.0)
    assert latent(layer).item() == pytest.approx(min(code, 2.75))
    assert layer.weight.item() == pytest.approx(code)


@pytest.mark.parametrize(("swing", "code"), [((1.1, 1.1, 1.1, 0.9), 3), ((0.9, 0.9, 0.9, 1.1), 1), ((3.1, 2.9), None)])
def test_on_a_balanced_grid_a_weight_is_frozen_at_an_odd_code(swing: tuple[float, ...], code: int | None) -> None:
    """Step 1, levels at 0.5, 1.5, 2.5 and 3.5; the code of a level is twice as much."""
    layer = layer_of(torch.tensor([[swing[0]]]), weight_levels="balanced")
    weight_quantizer(layer).set_alpha_(torch.tensor(3.5))
    oscillations = Oscillations(layer, 400, freeze=0.05)
    feed(oscillations, layer, [[value] for value in swing] * 60)
    assert history(oscillations, "frozen").all()
    found = int(history(oscillations, "codes").item())
    assert found == code if code else found in (5, 7)
    assert layer.weight.item() == pytest.approx(found / 2)
    assert latent(layer).item() == pytest.approx(min(found / 2, 3.25))  # of the outer bin a quarter of a step inside


def test_dampening_on_a_balanced_grid_pulls_to_its_levels() -> None:
    layer = layer_of(torch.tensor([[0.7, -0.1, 9.0]]), weight_levels="balanced")
    weight_quantizer(layer).set_alpha_(torch.tensor(3.5))
    oscillations = Oscillations(layer, 4, dampen=1.0)
    oscillations.load_state_dict(oscillations.state_dict() | {"calls": 4})
    assert oscillations.penalty().item() == pytest.approx(0.2**2 + 0.4**2, rel=1e-5)


# ---------------------------------------------------------------------- the toy problem

TOY_STEPS = 800
TARGETS = torch.arange(5, 100, 10)[None] / 100


def train_toy(**settings: float) -> tuple[Tensor, Oscillations]:
    """Flips of the code in each step of gradient descent on (Q(w) - t)^2, step 1, and who watched."""
    layer = layer_of(torch.full_like(TARGETS, 0.25))
    oscillations = Oscillations(layer, TOY_STEPS, **settings)
    flips, before = [], layer.weight.detach()
    for _ in range(TOY_STEPS):
        loss = ((layer.weight - TARGETS) ** 2).sum() + oscillations.penalty()
        (gradient,) = torch.autograd.grad(loss, latent(layer))
        latent(layer).data.sub_(0.02 * gradient)
        oscillations.step()
        flips.append(layer.weight.detach() != before)
        before = layer.weight.detach()
    return torch.stack(flips), oscillations


def test_straight_through_gradients_oscillate() -> None:
    """A weight at distance d from its level is away from it one step in 1 / d: 2 min(t, 1 - t) changes a step."""
    flips, oscillations = train_toy()
    rate = flips[400:].float().mean(0)
    torch.testing.assert_close(rate, 2 * torch.minimum(TARGETS, 1 - TARGETS), atol=0.02, rtol=0)
    assert list(oscillations.frequency().values()) == [1.0]


def test_freezing_stops_the_oscillation_at_the_nearer_level() -> None:
    flips, oscillations = train_toy(freeze=0.01, momentum=0.03)  # 200 steps must be long for the mean code
    assert flips[:200].any(0).all()
    assert not flips[600:].any()
    assert list(oscillations.frozen().values()) == [1.0]
    assert torch.equal(history(oscillations, "codes"), TARGETS.round())


def test_dampening_stops_the_oscillation() -> None:
    """Stable once lambda exceeds |Q(w) - t| / |Q(w) - w| at the boundary, that is 2 |Q(w) - t| for the nearer level."""
    flips, _ = train_toy(dampen=2.0)
    assert not flips[700:].any()
    flips, _ = train_toy(dampen=0.01)
    assert flips[700:].any(0).all()


# ---------------------------------------------------------------------- resume, errors


def test_resume_is_exact() -> None:
    target = torch.linspace(-2.2, 2.2, 20).reshape(4, 5)

    def go_on(layer: nn.Linear, oscillations: Oscillations, optimizer: torch.optim.SGD, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (((layer.weight - target) ** 2).sum() + oscillations.penalty()).backward()
            optimizer.step()
            oscillations.step()

    def fresh() -> tuple[nn.Linear, Oscillations, torch.optim.SGD]:
        layer = layer_of(torch.linspace(-2, 2, 20).reshape(4, 5))
        settings = {"dampen": 0.01, "freeze": 0.03}
        return layer, Oscillations(layer, 300, **settings), torch.optim.SGD(layer.parameters(), 0.05, momentum=0.5)

    whole, half = fresh(), fresh()
    go_on(*whole, 300)
    go_on(*half, 150)
    states = copy.deepcopy([part.state_dict() for part in half])
    go_on(*half, 50)  # what is saved does not follow
    other = fresh()
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    go_on(*other, 150)
    assert 0 < history(whole[1], "frozen").float().mean() < 1
    torch.testing.assert_close(other[1].state_dict(), whole[1].state_dict(), rtol=0, atol=0)
    assert torch.equal(latent(other[0]), latent(whole[0]))


def test_a_saved_state_does_not_follow_training() -> None:
    layer = layer_of(torch.zeros(1, 1))
    oscillations = Oscillations(layer, 9)
    state = oscillations.state_dict()
    before = copy.deepcopy(state)
    feed(oscillations, layer, [[1.0], [0.0]])
    torch.testing.assert_close(state, before)


def test_a_state_of_another_model_is_refused() -> None:
    state = Oscillations(layer_of(torch.zeros(2, 3)), 1).state_dict()
    with pytest.raises(ConfigError, match=r"weight of shape \(4, 3\), found \(2, 3\).* same model"):
        Oscillations(layer_of(torch.zeros(4, 3)), 1).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "at least one step, found total_steps=0"),
        ({"dampen": -0.1}, "dampen >= 0, found -0.1"),
        ({"dampen": math.inf}, "dampen >= 0, found inf"),
        ({"freeze": 0.0}, "freeze above 0 and at most 0.1, found 0.0"),
        ({"freeze": 0.2}, "freeze above 0 and at most 0.1, found 0.2"),
        ({"momentum": 0.0}, "momentum above 0 and at most 1, found 0.0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Oscillations(layer_of(torch.zeros(1, 1)), **({"total_steps": 10} | settings))


def test_a_float_model_is_refused() -> None:
    with pytest.raises(OrderError, match="expected a prepared model"):
        Oscillations(nn.Linear(3, 2), 1)
