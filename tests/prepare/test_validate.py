from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from nipq.config import Config, Rule
from nipq.errors import ConfigError, Diagnostic, NotQuantizableError
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate

X = torch.zeros(1, 4)


def found(model: nn.Module, x: object = X, config: Config | None = None) -> dict[tuple[str, str], Diagnostic]:
    return {(finding.severity, finding.name): finding for finding in validate(model, x, config)}


def refused(model: nn.Module, message: str, config: Config | None = None, x: object = X) -> None:
    """Both say so: ``validate`` as a finding, ``prepare_`` as an error; the model stays as it was."""
    keys = list(dict(model.named_parameters()))
    errors = [str(finding) for finding in validate(model, x, config) if finding.severity == "error"]
    assert any(message in error for error in errors), errors
    with pytest.raises(NotQuantizableError) as caught:
        prepare_(model, x, config)
    assert message in str(caught.value)
    assert list(dict(model.named_parameters())) == keys


# ---------------------------------------------------------------------- refusals


def test_weight_norm_is_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU(), parametrizations.weight_norm(nn.Linear(4, 4)))
    refused(model, "error: 1: its weight is not a plain parameter (weight norm). Call torch.nn.utils.")


def test_pruning_is_refused_by_name() -> None:
    model = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 2))
    refused(model, "error: 0: its weight is not a plain parameter")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    refused(model, "error: 1: its weight holds NaN or infinity. Load a sound checkpoint.")
    assert not [key for key in found(model, config=Config(rules=[Rule("1", quantize=False)])) if key[0] == "error"]


def test_complex_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))
    refused(model, "error: 0: its weight is of type torch.complex64", x=X.to(torch.complex64))


def test_lazy_layers_are_refused_before_they_are_run() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    refused(model, "error: 0.weight: it has no shape yet. Run one float forward before preparing.")
    assert isinstance(model[0], nn.LazyLinear)


def test_weights_without_values_are_refused() -> None:
    refused(nn.Sequential(nn.Linear(4, 4, device="meta")), "error: 0.weight: it has no values yet. Load the weights")


class OptimizedModule(nn.Module):
    """Stands in for what ``torch.compile`` returns, which is told by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a wrapped model is refused before it is run")


@pytest.mark.parametrize("inside", [False, True])
def test_wrapped_models_are_refused(inside: bool) -> None:
    for wrap in (nn.DataParallel, OptimizedModule):
        model = wrap(nn.Linear(4, 4))
        name = "0" if inside else "the model"
        message = f"error: {name}: it is wrapped in {wrap.__name__}. Prepare the bare model first"
        refused(nn.Sequential(model) if inside else model, message)


def test_a_compiled_model_is_refused() -> None:
    refused(torch.compile(nn.Linear(4, 4)), "it is wrapped in OptimizedModule")


def test_a_prepared_model_is_an_error_too() -> None:
    model = prepare_(nn.Sequential(nn.Linear(4, 4)), X)
    assert found(model)["error", "0"].remedy == "Call nipq.restore_(model) first."


def test_channels_of_a_grouped_transposed_convolution_are_refused() -> None:
    model, x = nn.Sequential(nn.ConvTranspose1d(4, 4, 2, groups=2)), torch.zeros(1, 4, 3)
    message = "error: 0: clipping ranges per channel of a grouped transposed convolution do not lie along one axis"
    refused(model, message, Config(granularity="channel"), x)
    prepare_(model, x)


def test_every_refusal_is_in_the_message() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), prune.identity(nn.Linear(4, 4), "weight"))
    with pytest.raises(NotQuantizableError, match=r"error: 0: [^\n]*\nerror: 1: "):
        prepare_(model, X)


# ---------------------------------------------------------------------- what stays float, and notes


class Net(nn.Module):
    """A little of everything that deserves a line."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.shared = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.shared.weight
        self.decoder = nn.Linear(4, 4)
        self.decoder.weight = self.table.weight
        self.scaled = ScaledLinear(4, 4)
        self.auxiliary = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.zeros_like(x, dtype=torch.long))[:, 0]
        x = self.attention(x, x, x)[0]
        x = x * torch.sigmoid(self.tied(self.shared(self.shared(x))))
        return self.scaled(self.decoder(x))


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_everything_that_stays_float_is_listed_with_a_reason() -> None:
    floats = {name: finding.reason for (severity, name), finding in found(Net()).items() if severity == "float"}
    assert floats["auxiliary"] == "the example forward does not call it"
    reader = "the example forward does not call it; attention reads its weight or bias"
    assert floats["attention.out_proj"] == reader
    assert floats["attention.in_proj_weight"] == "MultiheadAttention has no quantized form here"
    assert floats["attention"].startswith("multi_head_attention_forward: ")
    of_the_model = [
        finding.reason for finding in validate(Net(), X) if (finding.name, finding.severity) == ("", "float")
    ]
    assert [reason.split(":")[0] for reason in of_the_model] == ["add", "sigmoid", "mul"]


def test_what_happens_unasked_is_noted() -> None:
    notes = [(f.name, f.reason) for f in validate(Net(), X) if f.severity == "note"]
    assert ("shared", "one forward calls it 2 times; one weight and one input quantizer serve every call") in notes
    assert ("shared", "it shares its weight, and so its weight quantizer, with tied") in notes
    assert ("table", "it shares its weight, and so its weight quantizer, with decoder") in notes
    own = (
        "ScaledLinear has a forward of its own that does more than its operation; it is kept, and computes in floats "
        "on the quantized weight and first input"
    )
    assert ("scaled", own) in notes
    assert len(notes) == 4


def test_excluded_layers_and_inputs_are_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    listed = found(model, config=Config(input_bits=None, rules=[Rule("1", quantize=False)]))
    assert listed["float", "1"].reason == "a rule excludes it"
    assert listed["float", "0.input"].reason == "the settings leave this input float"


def test_a_plain_model_has_no_findings() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert validate(model, torch.zeros(1, 1, 4, 4)) == []


def test_refusals_come_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), parametrizations.weight_norm(nn.Linear(4, 4)))
    severities = [finding.severity for finding in validate(model, X)]
    assert severities[0] == "error"
    assert set(severities[1:]) == {"float"}


def test_a_rule_that_matches_nothing_is_an_error_here_too() -> None:
    with pytest.raises(ConfigError, match="Rule 'nothing'"):
        validate(nn.Sequential(nn.Linear(4, 4)), X, Config(rules=[Rule("nothing", weight_bits=4)]))


def test_a_finding_reads_as_one_line() -> None:
    assert str(Diagnostic("a.b", "float", "why")) == "float: a.b: why."
    assert str(Diagnostic("", "error", "why", "Do this.")) == "error: the model: why. Do this."
