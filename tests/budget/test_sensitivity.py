"""Noise sensitivity and the allocation of bits by it: closed forms on quadratic losses, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from nipq.budget.allocate import MARGINS, allocate_bits_
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize, costs
from nipq.budget.distance import output_distance
from nipq.budget.sensitivity import noise_losses
from nipq.config import BitRange, Config
from nipq.errors import BudgetError, ConfigError, NonFiniteError, OrderError
from nipq.prepare.layer_table import layer_table, phase_of, quantizers, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

Loader = list[tuple[Tensor, Tensor]]


def batches(count: int = 4, size: int = 32) -> Loader:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 8, generator=generator), torch.randn(size, 4, generator=generator)) for _ in range(count)
    ]


def prepared(model: nn.Module, loader: Loader, **settings: object) -> nn.Module:
    return calibrate_(prepare_(model, loader[0][0], Config(**{"input_bits": None, "init": "max", **settings})), loader)


def squared(outputs: Tensor, _targets: Tensor) -> Tensor:
    return outputs.square().sum(1).mean()


def two_layers(scale: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[3].weight.mul_(scale)
    return model


def test_the_loss_of_a_linear_layer_has_its_closed_form() -> None:
    """E[L(W + eps D)] - L(W) = D^2 / 12 * outputs * E|x|^2 for L = |W x|^2, in range."""
    loader = batches(64)
    torch.manual_seed(0)
    model = prepared(nn.Sequential(nn.Linear(8, 4, bias=False)), loader)
    (row,) = layer_table(model)
    found = noise_losses(model, [row.weight], loader, squared, batches=64)[row.weight.name]
    power = torch.stack([x.square().sum(1).mean() for x, _ in loader]).mean()
    step, n = float(row.weight.step().detach()), 2.0 ** (5 - 1) - 1  # bits start in the middle of 2 to 8
    inside = (row.layer.parametrizations.weight.original.abs() < row.weight.alpha).double().mean()
    # -dE/db / (2 ln 2), with D' = -D ln 2 2^(b-1) / n
    expected = step**2 / 12 * 4 * float(power) * 2**4 / n * float(inside)
    # eps^2 has mean 1/12 and relative deviation 0.9; 32 weights, 64 draws, weighted evenly but for |x_i|^2
    assert found == pytest.approx(expected, rel=5 * 0.9 / (32 * 64) ** 0.5)


def test_what_is_linear_in_the_noise_cancels() -> None:
    loader = batches()

    def tilted(outputs: Tensor, targets: Tensor) -> Tensor:
        return squared(outputs, targets) + 100 * outputs.mean()

    model = prepared(nn.Sequential(nn.Linear(8, 4)), loader)
    (row,) = layer_table(model)
    plain, slanted = (noise_losses(model, [row.weight], loader, loss, batches=4) for loss in (squared, tilted))
    assert slanted[row.weight.name] == pytest.approx(plain[row.weight.name], rel=1e-3)


class Branches(nn.Module):
    """Two equal layers, of which one counts more."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.factor, self.loud, self.quiet = factor, nn.Linear(8, 4), nn.Linear(8, 4)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.loud(x) + self.quiet(x)


def test_bits_go_where_noise_hurts_and_keep_the_budget() -> None:
    loader = batches()
    model = prepared(Branches(8.0), loader)
    losses = allocate_bits_(model, loader, AverageBits(weights=4), squared)
    assert set(losses) == {quantizer.name for quantizer in quantizers(model) if quantizer.role == "weight"}
    # 64 times the loss, so three bits apart by 4^-b; 5.5 and 2.5 do not exist, and the sum is to be 8 at most
    assert losses["loud.weight"] / losses["quiet.weight"] == pytest.approx(64, rel=0.5)
    assert [round(float(row.weight.bits.detach())) for row in layer_table(model)] in ([5, 3], [6, 2])


@pytest.mark.parametrize(
    "budget",
    [
        AverageBits(weights=2.1, activations=8),
        AverageBits(weights=2.5, activations=2.3),
        AverageBits(weights=4, activations=4),
        AverageBits(weights=7.9),
        ModelSize(1650),
        BitOps(4000),
    ],
)
def test_continuous_bits_start_on_the_budget_and_not_above_it(budget: Budget) -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    allocate_bits_(model, loader, budget, mse_loss)
    for limit in costs(model, budget):
        assert limit.soft <= limit.target * (1 + 1e-6)
    starts = [float(quantizer.bits.detach()) for quantizer in quantizers(model) if not quantizer.is_frozen]
    assert all(2 + 0.9 * float(MARGINS[-1]) < bits < 8 - 0.9 * float(MARGINS[-1]) for bits in starts)


def test_a_start_stays_off_the_ends_of_the_range_where_the_budget_has_room() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    allocate_bits_(model, loader, AverageBits(weights=2.25, activations=8), mse_loss)
    for row in layer_table(model):
        assert float(row.weight.bits.detach()) == pytest.approx(2 + MARGINS[0])
        if row.input is not None:
            assert float(row.input.bits.detach()) == pytest.approx(8 - MARGINS[0])


def test_a_budget_that_only_the_fewest_bits_keep_is_exceeded_by_a_thousandth() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    allocate_bits_(model, loader, AverageBits(weights=2), mse_loss)
    (limit,) = costs(model, AverageBits(weights=2))
    assert limit.soft == pytest.approx(2 + 6 / 1000, abs=1e-4)
    assert limit.rounded == 2


def test_whole_bits_use_the_budget_that_margins_would_take() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    allocate_bits_(model, loader, AverageBits(weights=2.1, activations=3), mse_loss, whole=True)
    for limit in costs(model, AverageBits(weights=2.1, activations=3)):
        assert limit.soft == pytest.approx(limit.rounded, abs=0.01)
        assert limit.rounded <= limit.target


def test_a_second_round_measures_at_the_bits_of_the_first() -> None:
    loader = batches()
    model, twin = prepared(two_layers(), loader), prepared(two_layers(), loader)
    budget = AverageBits(weights=3, activations=3)
    twice = allocate_bits_(model, loader, budget, mse_loss, rounds=2)
    allocate_bits_(twin, loader, budget, mse_loss, whole=True)
    assert allocate_bits_(twin, loader, budget, mse_loss) == twice


def test_without_a_loss_the_float_outputs_are_the_targets() -> None:
    """The squared distance from float, by its closed form in a linear layer, whatever form batches have."""
    loader = batches(64)
    torch.manual_seed(0)
    layer = nn.Linear(8, 4, bias=False)
    model = prepared(nn.Sequential(layer), loader)
    (row,) = layer_table(model)
    weight = row.layer.parametrizations.weight.original

    def relative(outputs: Tensor, targets: Tensor) -> Tensor:
        return output_distance(outputs, [targets])

    answered = [(x, x @ weight.detach().T) for x, _ in loader]
    by_hand = noise_losses(model, [row.weight], answered, relative, batches=64)
    phase = phase_of(model)
    for forms in ([x for x, _ in loader], loader, [{"input": x} for x, _ in loader]):
        found = noise_losses(model, [row.weight], forms, batches=64)
        assert found[row.weight.name] == pytest.approx(by_hand[row.weight.name], rel=1e-4)
    assert phase_of(model) is phase


def test_distances_of_any_structure_count_each_tensor_alike() -> None:
    r, s = torch.tensor([0.0, 2.0]), torch.tensor([[10.0, -10.0]])
    assert float(output_distance((r + 1, {"more": s, "place": torch.arange(2)}), [r, s])) == pytest.approx(0.5)
    assert float(output_distance([s.flip(1)], [s])) == pytest.approx(4)
    assert float(output_distance(torch.zeros(3), [torch.zeros(3)])) == 0
    assert float(output_distance(torch.tensor(3.0), [torch.tensor(2.0)])) == pytest.approx(0.25)  # no variance
    with pytest.raises(ConfigError, match=r"expected outputs of the shapes of the float model's, \[\[2\]\]; found"):
        output_distance(torch.zeros(3), [r])
    with pytest.raises(ConfigError, match="expected a model that returns floating-point tensors"):
        output_distance({"place": torch.arange(2)}, [])


def test_one_width_and_unknown_methods() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    assert allocate_bits_(model, loader, AverageBits(weights=3.5, activations=4), method="uniform") == {}
    assert {row.weight.bits_rounded for row in layer_table(model)} == {3}
    assert all(quantizer.is_frozen for quantizer in quantizers(model))
    model = prepared(two_layers(), loader)
    with pytest.raises(ConfigError, match="expected method 'noise', 'hawq' or 'uniform', found 'best'"):
        allocate_bits_(model, loader, AverageBits(weights=3), method="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected rounds and batches of at least 1, found 0 and 32"):
        allocate_bits_(model, loader, AverageBits(weights=3), rounds=0)
    with pytest.raises(ConfigError, match='expected loss_fn with method="hawq"'):
        allocate_bits_(model, loader, AverageBits(weights=3), method="hawq")


def test_curvature_freezes_the_bits_that_hawq_chooses() -> None:
    pytest.importorskip("curvlinops")
    loader = batches()
    model = prepared(Branches(8.0), loader)
    allocate_bits_(model, loader, AverageBits(weights=4), squared, method="hawq")
    loud, quiet = (row.weight for row in layer_table(model))
    assert loud.is_frozen
    assert loud.bits_rounded > quiet.bits_rounded


def test_nothing_else_changes() -> None:
    loader = batches()
    model = prepared(two_layers(), loader, activation_bits=BitRange(fixed=6)).train()
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, phase = [module.training for module in model.modules()], phase_of(model)
    random = torch.get_rng_state()
    allocate_bits_(model, loader, AverageBits(weights=3, activations=6), mse_loss)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith("bit_raw") for name in changed)
    assert ([module.training for module in model.modules()], phase_of(model)) == (modes, phase)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    model.train()(loader[0][0])  # quantizers do again what they did


def test_a_negative_slope_on_the_only_batch_counts_by_its_size() -> None:
    """It says that the noise is as large as that, not that the tensor needs no bits."""
    loader = batches(1)
    model = prepared(nn.Sequential(nn.Linear(8, 4)), loader)
    (row,) = layer_table(model)
    losses = [noise_losses(model, [row.weight], loader, loss, batches=1) for loss in (squared, _negated)]
    assert losses[0][row.weight.name] == losses[1][row.weight.name] > 1e-6


def _negated(outputs: Tensor, targets: Tensor) -> Tensor:
    return -squared(outputs, targets)


def test_gradients_may_be_switched_off_around_it() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    expected = noise_losses(model, quantizers(model), loader, batches=4)
    with torch.no_grad():
        assert noise_losses(model, quantizers(model), loader, batches=4) == expected


def test_equal_seeds_give_equal_starts() -> None:
    loader = batches()
    starts = []
    for seed in (0, 0, 1):
        model = prepared(two_layers(), loader)
        starts.append(allocate_bits_(model, loader, AverageBits(weights=3, activations=3), mse_loss, seed=seed))
    assert starts[0] == starts[1] != starts[2]


def not_finite(outputs: Tensor, _targets: Tensor) -> Tensor:
    return outputs.sum() * float("nan")


@pytest.mark.parametrize(
    ("change", "loader", "loss", "weights", "error", "message"),
    [
        (None, batches(), mse_loss, 1, BudgetError, "1"),
        (None, [], mse_loss, 4, ConfigError, "allocate_bits_: expected at least one batch, found an empty loader"),
        (None, [batches()[0][0]], mse_loss, 4, ConfigError, r"expected batches \(inputs, targets\), found one without"),
        (
            None,
            batches(),
            not_finite,
            4,
            NonFiniteError,
            "batch 0: loss_fn: expected a finite loss, found nan",
        ),
        (
            "calibrated",
            batches(),
            mse_loss,
            4,
            OrderError,
            r"0\.weight: expected a calibrated clipping range",
        ),
    ],
)
def test_bad_calls_say_what_to_do(
    change: str | None,
    loader: Loader,
    loss: Callable[[Tensor, Tensor], Tensor],
    weights: float,
    error: type[Exception],
    message: str,
) -> None:
    model = prepared(two_layers(), batches())
    if change:
        layer_table(model)[0].weight.calibrated = False
    with pytest.raises(error, match=message):
        allocate_bits_(model, loader, AverageBits(weights=weights, activations=4), loss)
    assert "forward" not in layer_table(model)[0].weight.__dict__


def test_a_model_with_fixed_bits_has_nothing_to_start() -> None:
    loader = batches()
    model = prepared(two_layers(), loader)
    set_bits_(model, 4)
    assert allocate_bits_(model, loader, AverageBits(weights=4, activations=4), mse_loss) == {}
