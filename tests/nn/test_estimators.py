"""Each method inside a prepared model: what learns, what follows the tensor, what is deployed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from nipq.config import Config, Method
from nipq.errors import ConfigError, OrderError
from nipq.functional.baselines import sawb_range
from nipq.nn.estimators import ESTIMATORS
from nipq.nn.quantizer import OffsetInputQuantizer
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import layer_table, quantizers, set_noise_mix_, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups

METHODS = get_args(Method)
NOISY = ("nipq", "diffq")


def test_every_method_of_the_config_has_an_estimator() -> None:
    assert set(ESTIMATORS) == set(METHODS)
    assert all(estimator.method == method for method, estimator in ESTIMATORS.items())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


def prepared(x: Tensor, method: str, bits: object = 3, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))
    config = Config(method=method, weight_bits=bits, activation_bits=bits, **settings)
    return calibrate_(prepare_(model, x, config), [x])


def gradients(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Return whether each quantizer parameter got a gradient other than zero, by its kind."""
    model(x).square().sum().backward()
    found: dict[str, bool] = {}
    for quantizer in quantizers(model):
        for name, parameter in quantizer.named_parameters():
            moved = parameter.grad is not None and bool((parameter.grad != 0).any())
            found[f"{quantizer.role} {name}"] = found.get(f"{quantizer.role} {name}", False) or moved
    return found


@pytest.mark.parametrize(
    ("method", "learned"),
    [
        ("nipq", {"weight alpha_raw", "input alpha_raw"}),
        ("lsq", {"weight alpha_raw", "input alpha_raw"}),
        ("lsq+", {"weight alpha_raw", "input alpha_raw", "input offset"}),
        ("pact", {"input alpha_raw"}),
        ("diffq", set()),
        ("ste", set()),
    ],
)
@pytest.mark.parametrize("phase", ["noise", "round"])
def test_what_learns(method: str, learned: set[str], phase: str, x: Tensor) -> None:
    model = prepared(x, method)
    set_phase_(model, phase)
    assert {name for name, moved in gradients(model.train(), x).items() if moved} == learned


@pytest.mark.parametrize("method", [m for m in METHODS if m != "pact"])
def test_bits_learn_where_the_method_allows_it(method: str, x: Tensor) -> None:
    found = gradients(prepared(x, method, (2, 8)).train(), x)
    assert found["weight bit_raw"]
    assert found["input bit_raw"]


def test_pact_refuses_to_learn_bits(x: Tensor) -> None:
    with pytest.raises(OrderError, match=r"0\.input|0\.weight: expected a fixed bit-width, as pact gives it no gradi"):
        prepared(x, "pact", (2, 8), input_bits=None).train()(x)


@pytest.mark.parametrize("method", METHODS)
def test_training_sees_noise_or_levels(method: str, x: Tensor) -> None:
    model = prepared(x, method).train()
    first, second = model(x), model(x)
    assert torch.equal(first, second) == (method not in NOISY)
    set_phase_(model, "round")
    trained, evaluated = model(x), model.eval()(x)
    if method != "diffq":  # its boundary of inputs still runs after the largest magnitude
        assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("method", METHODS)
def test_the_deployed_model_is_the_trained_one(method: str, x: Tensor) -> None:
    model = prepared(x, method)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.01), lr=0.01)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()(x)
    set_phase_(model, "int")
    assert torch.equal(convert(model)(x), model(x))


def test_weights_of_diffq_and_pact_follow_the_tensor(x: Tensor) -> None:
    for method in ("diffq", "pact"):
        model = prepared(x, method)
        row = layer_table(model)[0]
        weight = row.layer.parametrizations.weight.original
        with torch.no_grad():
            weight.mul_(3)
        model.eval()(x)
        expected = weight.abs().max() if method == "diffq" else sawb_range(weight.detach(), 3)
        assert torch.allclose(row.weight.alpha, expected)


def test_the_range_of_ste_stays(x: Tensor) -> None:
    model = prepared(x, "ste")
    before = [quantizer.alpha.clone() for quantizer in quantizers(model)]
    assert all(group["name"] not in ("ranges", "bits") for group in param_groups(model, lr=1.0))
    model.train()(10 * x)
    assert all(torch.equal(a, q.alpha) for a, q in zip(before, quantizers(model), strict=True))


def test_diffq_inputs_run_after_the_largest_magnitude_while_training(x: Tensor) -> None:
    model = prepared(x, "diffq")
    quantizer = layer_table(model)[0].input
    assert quantizer is not None
    before = float(quantizer.alpha)
    model.eval()(5 * x)
    assert float(quantizer.alpha) == before
    model.train()(5 * x)
    largest = float((5 * x).abs().max())
    assert float(quantizer.alpha) == pytest.approx(before + 0.1 * (largest - before), rel=1e-5)


# ---------------------------------------------------------------------- LSQ+


def test_an_offset_starts_at_the_lowest_value_and_travels_in_the_state(x: Tensor) -> None:
    model = prepared(x, "lsq+")
    third = layer_table(model)[2].input
    assert isinstance(third, OffsetInputQuantizer)
    lowest = float(nn.functional.silu(torch.linspace(-5, 5, 1001)).min())
    assert lowest <= float(third.offset.detach()) < 0
    assert third.grid.kind == "shifted"
    assert third.grid.shift == pytest.approx(-float(third.offset.detach()))
    with torch.no_grad():
        third.offset.fill_(-0.123)
    twin = prepared(2 * x, "lsq+")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    groups = {group["name"]: group["params"] for group in param_groups(model, lr=0.1)}
    assert any(parameter is third.offset for parameter in groups["ranges"])


# ---------------------------------------------------------------------- tempering


def test_a_share_of_one_is_the_true_quantizer(x: Tensor) -> None:
    model = prepared(x, "nipq").train()
    set_noise_mix_(model, 1.0)
    tempered = model(x)
    set_phase_(model, "round")
    assert torch.allclose(tempered, model(x), atol=1e-5)
    set_noise_mix_(model, 0.0)
    set_phase_(model, "noise")
    assert not torch.allclose(model(x), model(x))
    assert not any("error_share" in name for name in model.state_dict())


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float, x: Tensor) -> None:
    with pytest.raises(ConfigError, match="expected a share from 0 to 1"):
        set_noise_mix_(prepared(x, "nipq"), share)
