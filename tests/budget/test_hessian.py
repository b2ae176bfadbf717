"""Traces and eigenvalues against closed forms, and what the Hessian is taken of."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from nipq.budget.hessian import DENSE, curvature, float_copy, input_traces, weight_traces
from nipq.config import Config
from nipq.errors import ConfigError, MissingDependencyError
from nipq.prepare.layer_table import set_phase_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_


def regression(inputs: int, outputs: int, samples: int = 60) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, inputs, dtype=torch.float64, generator=generator)
    y = torch.randn(samples, outputs, dtype=torch.float64, generator=generator)
    return nn.Linear(inputs, outputs).double(), x, y


def hessian_of_regression(x: torch.Tensor, outputs: int) -> torch.Tensor:
    """Of the mean over samples and outputs of the squared error, in the weight: (2 / N M) I (x) X^T X."""
    return torch.kron(torch.eye(outputs, dtype=x.dtype), 2 * x.T @ x / (len(x) * outputs))


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (13, 7)])
def test_linear_regression_has_the_closed_form(inputs, outputs) -> None:
    model, x, y = regression(inputs, outputs)
    assert (inputs * outputs > DENSE) == (inputs == 13)  # one by the matrix, one by Lanczos
    batches = [(x[:50], y[:50]), (x[50:], y[50:])]  # of unequal size
    found = curvature(model, batches, mse_loss, probes=400, tolerance=1e-10, seed=1)
    exact = hessian_of_regression(x, outputs)
    assert found.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-8)
    weight = found.tensors["weight"]
    assert abs(weight.trace - float(exact.trace())) < 4 * weight.error < 0.1 * float(exact.trace())
    # The error bar is Hutchinson's: variance 2 (||H||_F^2 - sum of squares on the diagonal) for random signs.
    variance = 2 * (exact.square().sum() - exact.diagonal().square().sum())
    assert weight.error == pytest.approx(float(variance / 400) ** 0.5, rel=0.25)
    assert (found.samples, found.probes, weight.count) == (60, 400, inputs * outputs)


def test_one_probe_is_exact_on_a_diagonal_hessian() -> None:
    model, _, _ = regression(4, 2)
    x = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    batches = [(3 * x, torch.zeros(4, 2, dtype=torch.float64))]
    found = [weight_traces(model, batches, mse_loss, {"it": p}, probes=2)["it"] for p in (model.weight, model.bias)]
    assert [one.trace for one in found] == pytest.approx([2 * 9 * 4, 2], rel=1e-12)  # 9 I_4 for each of 2 outputs
    assert [one.error for one in found] == pytest.approx([0, 0], abs=1e-12)
    assert model.weight.grad is None
    assert model.weight.requires_grad


def test_a_loss_without_curvature_has_none() -> None:
    model, x, y = regression(3, 2)
    found = curvature(model, [(x, y)], lambda out, _: out.mean(), parameters=["weight", "bias"], probes=2)
    assert found.eigenvalue == 0
    assert found.total.trace == 0


def test_negative_curvature_is_not_the_top_eigenvalue() -> None:
    model, x, y = regression(9, 9)
    found = curvature(model, [(x, y)], lambda out, _: -(out**2).mean(), probes=2, tolerance=1e-8)
    exact = -hessian_of_regression(x, 9)
    assert found.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-4)
    assert found.total.trace < 0


def small_net() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(1, 4, 3, groups=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, groups=4)]
    return nn.Sequential(*conv, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def prepared_net() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    model, images = small_net(), torch.randn(12, 1, 8, 8)
    prepare_(model, images[:1], Config(weight_bits=3, activation_bits=3))
    calibrate_(model, [images])
    set_phase_(model.eval(), "round")
    return model, [(images, torch.arange(12) % 3)]


def test_a_prepared_model_is_measured_at_its_quantized_weights() -> None:
    model, batches = prepared_net()
    plain = small_net().eval()
    with torch.no_grad():
        for place in (0, 3, 7):
            plain[place].weight.copy_(model[place].weight)  # Q(w)
            plain[place].bias.copy_(model[place].bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learned = [p.requires_grad for p in model.parameters()]
    loss = nn.CrossEntropyLoss()
    found = curvature(model, batches, loss, probes=3)
    assert found == curvature(plain, batches, loss, probes=3)
    assert list(found.tensors) == ["0.weight", "3.weight", "7.weight"]
    float_found = curvature(model, batches, loss, probes=3, quantized=False)
    assert float_found == curvature(float_copy(model, quantized=False), batches, loss, probes=3)
    assert float_found.total.trace != found.total.trace
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == learned


def test_the_seed_decides_the_probes() -> None:
    model, batches = prepared_net()
    first, again, other = (curvature(model, batches, nn.CrossEntropyLoss(), probes=2, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.total.trace != other.total.trace
    assert other.eigenvalue == pytest.approx(first.eigenvalue, rel=1e-2)


def test_trace_in_the_input_of_a_layer_is_that_of_one_sample() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    x = torch.randn(10, 3, dtype=torch.float64)
    batches = [(x[:7], None), (x[7:], None)]

    def loss(out, _):
        return (out**2).sum(1).mean()

    found = input_traces(model, batches, loss, {"in": model[0]}, probes=2)["in"]
    assert found.trace == pytest.approx(2 * (1 + 4 + 9), rel=1e-12)  # tr of 2 W^T W
    assert found.error < 1e-12
    assert found.count == 3


def test_calls_of_one_layer_count_together_and_the_network_is_as_it_was() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False).double()
            nn.init.eye_(self.layer.weight)

        def forward(self, x):
            return self.layer(x) + 3 * self.layer(input=-x)

    model, x = Twice(), torch.randn(4, 2, dtype=torch.float64)
    expected = model(x)
    found = input_traces(model, [(x, None)], lambda out, _: (out**2).sum(1).mean(), {"l": model.layer}, probes=64)
    # 2 for the first call, 18 for the second; between them the two calls share outputs, so probes differ.
    assert abs(found["l"].trace - 2 * (2 + 18)) < 4 * found["l"].error
    assert found["l"].count == 4
    assert torch.equal(model(x), expected)
    assert not model.layer._forward_pre_hooks


def test_a_hard_sigmoid_has_a_second_derivative() -> None:
    """A gate a h(b x) of a squeeze-and-excite block in one number, h the hard sigmoid: its Hessian by hand."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.5, 0.5))
            self.gate = nn.Hardsigmoid(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a * self.gate(self.b * x)

    x = torch.tensor([[1.0], [-2.0], [9.0]], dtype=torch.float64)  # two on the slope, one beyond it
    found = curvature(Gate(), [(x, torch.zeros_like(x))], mse_loss, parameters=["a", "b"], probes=2)
    h, slope = (0.5 * x + 3).clamp(0, 6) / 6, torch.where(x < 6, x / 6, 0)
    exact = 2 * torch.stack([(h * h).mean(), 2 * (1.5 * h * slope).mean(), (1.5 * slope).square().mean()])
    matrix = torch.stack([exact[[0, 1]], exact[[1, 2]]])
    assert found.eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-9)


def test_attention_has_a_second_derivative() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(self.map(x), x, x)

    found = curvature(Attention(), [(torch.randn(2, 1, 5, 8), torch.zeros(2, 1, 5, 8))], mse_loss, probes=2)
    assert found.total.trace != 0


@pytest.mark.parametrize(
    ("batches", "names", "message"),
    [
        ([], None, "at least one batch, found an empty loader"),
        (
            [torch.zeros(2, 3)],
            None,
            r"expected batches \(inputs, targets\), found one without targets: float32",
        ),
        (
            [(torch.zeros(2, 3), torch.zeros(2, 2))],
            ["weigth"],
            r"found \['weigth'\]. Correct them; there are weight, bias",
        ),
        ([(torch.zeros(2, 3), torch.zeros(2, 2))], [], "float network's parameters, found none"),
    ],
)
def test_what_cannot_be_measured_is_refused(batches, names, message) -> None:
    with pytest.raises(ConfigError, match=message):
        curvature(nn.Linear(3, 2), batches, mse_loss, parameters=names)


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    def missing(module, **settings):
        raise MissingDependencyError(str(settings))

    monkeypatch.setattr("nipq.budget.hessian.require", missing)
    with pytest.raises(MissingDependencyError, match="'extra': 'analysis'"):
        curvature(nn.Linear(3, 2), [(torch.zeros(2, 3), torch.zeros(2, 2))], mse_loss)


def test_the_result_is_plain_data() -> None:
    model, x, y = regression(3, 2)
    found = curvature(model, [(x, y)], mse_loss, probes=2)
    assert json.loads(json.dumps(found.to_dict()))["tensors"]["weight"]["count"] == 6
