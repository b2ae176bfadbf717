from __future__ import annotations

import copy
import operator
import re
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from nipq.config import Config, Rule
from nipq.errors import ConfigError, Diagnostic, NotQuantizableError
from nipq.prepare.findings import checked_trace
from nipq.prepare.prepare import prepare_
from nipq.prepare.validate import validate
from nipq.report.inspect import inspect
from tests.prepare import attention_net

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


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


#: A layer whose weight or bias is computed -> what the refusal says of it.
COMPUTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: parametrizations.weight_norm(linear()), "weight is not a plain parameter (weight norm)"),
    "old weight norm": (lambda: old_weight_norm(linear()), "weight is not a plain parameter (weight norm)"),
    "spectral norm": (lambda: parametrizations.spectral_norm(linear()), "weight is not a plain parameter (spectral"),
    "old spectral norm": (lambda: nn.utils.spectral_norm(linear()), "weight is not a plain parameter (spectral norm)"),
    "pruning": (lambda: prune.l1_unstructured(linear(), "weight", 2), "weight is not a plain parameter (pruning)"),
    "pruned twice": (
        lambda: prune.random_structured(prune.l1_unstructured(linear(), "weight", 2), "weight", 1, dim=0),
        "weight is not a plain parameter (pruning)",
    ),
    "pruned bias": (lambda: prune.l1_unstructured(linear(), "bias", 2), "bias is not a plain parameter (pruning)"),
    "bias of its own": (
        lambda: parametrize.register_parametrization(linear(), "bias", Doubled()),
        "bias is not a plain parameter (parametrized by Doubled)",
    ),
    "weight of its own": (
        lambda: parametrize.register_parametrization(linear(), "weight", Doubled()),
        "weight is not a plain parameter (parametrized by Doubled)",
    ),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_parameters_are_refused_and_the_named_call_helps(case: str) -> None:
    make, reason = COMPUTED[case]
    model = nn.Sequential(nn.ReLU(), make(), nn.Linear(4, 4)).eval()
    refused(model, f"error: 1: its {reason}")
    x, (found,) = torch.randn(2, 4), [found for found in validate(model, X) if found.severity == "error"]
    assert found.remedy.endswith("or leave the layer float with Rule('1', quantize=False).")
    prepare_(copy.deepcopy(model), X, Config(rules=[Rule("1", quantize=False)]))
    before = model(x)
    call = re.match(r"Call torch\.([\w.]+)\(model\.get_submodule\('1'\), '(\w+)'\)", found.remedy)
    assert call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        operator.attrgetter(call[1])(torch)(model[1], call[2])
    assert torch.allclose(model(x), before)
    assert not [found for found in validate(model, X) if found.severity == "error"]
    prepare_(model, X)


def test_weights_of_other_kinds_are_refused() -> None:
    class Packed(Tensor):
        """As quantized tensors of other libraries: floats to torch, something else in fact."""

    model = nn.Sequential(linear(), linear())
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    model[1].weight = nn.Parameter(torch.ones(4, 4).as_subclass(Packed))
    model[0].forward = lambda x: x  # its own operation would fail
    refused(model, "error: 0: its weight is of type torch.uint8 (Parameter). Load or convert it as plain floats")
    refused(model, "error: 1: its weight is of type torch.float32 (Packed)")
    prepare_(nn.Sequential(*model, linear()), X, Config(rules=[Rule("[01]", quantize=False)]))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0, 0] = value
    refused(model, "error: 1: its weight holds NaN or infinity. Load a sound checkpoint.")
    assert ("error", "1") not in found(model, config=Config(rules=[Rule("1", quantize=False)]))


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
    for wrap, inner in ((nn.DataParallel, "module"), (OptimizedModule, "_orig_mod")):
        model = wrap(nn.Linear(4, 4))
        name, where = ("0", "0") if inside else ("the model", "model")
        message = f"error: {name}: it is wrapped in {wrap.__name__}. Prepare the bare model first ({where}.{inner})"
        refused(nn.Sequential(model) if inside else model, message)
        prepare_(getattr(model, inner), X)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch 2.11 about itself
def test_a_compiled_model_is_refused() -> None:
    refused(torch.compile(nn.Linear(4, 4)), "it is wrapped in OptimizedModule")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch 2.11 about itself
def test_models_compiled_in_place_are_refused_and_the_remedies_help() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].compile()
    refused(
        model, "error: 0: it was compiled in place (module.compile()). Set its attribute _compiled_call_impl to None"
    )
    model[0]._compiled_call_impl = None
    prepare_(model, X)
    model = nn.Sequential(nn.Linear(4, 4))
    model.forward = torch.compile(model.forward)
    refused(
        model, "error: the model: its attribute forward holds a compiled function. Delete the attribute (del module."
    )
    del model.forward
    prepare_(model, X)


def test_parameters_of_other_processes_or_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].bias.ds_id = 0  # as DeepSpeed marks what it has taken away
    refused(model, "error: 0.bias: it is distributed over processes. Prepare before distributing.")


def test_layers_that_are_called_or_read_past_their_hooks_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.direct, self.read, self.last = (nn.Linear(4, 4) for _ in range(4))
            self.weights = [self.read.weight]

        def forward(self, x: Tensor) -> Tensor:
            x = self.direct.forward(self.both.forward(self.both(x)))
            return self.last(self.read(x) @ self.weights[0])

    model = Net()
    refused(
        model, "error: both: its forward is called directly as well, past the hooks that quantize its input. Call the"
    )
    refused(
        model, "error: read: its weight or bias is read past the layer by the model (from a list, a closure or param"
    )
    rules = [Rule("both", quantize=False), Rule("read", quantize=False)]
    floats = found(model, config=Config(rules=rules))
    assert floats["float", "direct"].reason == "the example forward calls its forward directly, past its hooks"
    prepare_(model, X, Config(rules=rules))


@pytest.mark.parametrize("how", ["data", "no_grad", "view"])
def test_layers_whose_weight_the_forward_writes_are_refused(how: str) -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            match how:
                case "data":
                    self.layer.weight.data.clamp_(-1, 1)
                case "no_grad":
                    with torch.no_grad():
                        self.layer.weight.clamp_(-1, 1)
                case "view":
                    self.layer.weight.detach()[0].zero_()
            return self.head(self.layer(x))

    refused(
        Clipped(), "error: layer: the forward writes into its weight or bias, and a quantized weight is computed anew"
    )
    assert not [name for severity, name in found(Clipped()) if severity == "error" and name != "layer"]


def test_what_only_a_rehearsal_finds_is_listed_too() -> None:
    class Closure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
            layer = self.layer
            self.call = lambda x: layer(x)  # a copy calls the original

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.call(x))

    refused(Closure(), "layer: a copy of the model still calls the layer of the model itself")
    assert inspect(Closure(), X).layers == ()


def test_models_that_cannot_be_copied_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.lock = threading.Lock()
    assert (
        "it cannot be copied, as converting it will need (TypeError: cannot pickle" in found(model)["error", ""].reason
    )


def test_validating_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    before, attributes = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
    assert validate(model, X) == []
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attributes_with_names_of_ours_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].quantization, model[1].parametrizations, model[2].deployed_in = "int4", nn.Module(), "here"
    for place, name in enumerate(("quantization", "parametrizations", "deployed_in")):
        refused(
            model, f"error: {place}: it has an attribute {name!r}, a name that preparing needs. Rename it, or leave"
        )
    prepare_(model, X, Config(rules=[Rule("[012]", quantize=False)]))
    assert model[0].quantization == "int4"


def test_an_attention_module_with_a_name_of_ours_is_refused() -> None:
    model = attention_net.Net()
    model.inner.attention_products = 3
    assert not [finding for finding in validate(model, attention_net.X) if finding.severity == "error"]
    message = "error: inner: it has an attribute 'attention_products', a name of ours"
    refused(model, message, Config(attention_bits=4), attention_net.X)


def test_relus_with_an_attribute_of_ours_are_left_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert checked_trace(model, X, Config()).layers[1].relu == "1"
    model[1].folded_into = 3
    assert checked_trace(model, X, Config()).layers[1].relu is None


def test_layers_read_by_others_and_norms_that_are_never_called_are_noted() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.head, self.bn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.encode(x)) @ self.encode.weight)

    listed = found(Decoder())
    assert listed["note", "encode"].reason.startswith(
        "its weight or bias is read by the model, too, which sees the quant"
    )
    assert listed["note", "bn"].reason == "the example forward does not call this batch norm; its statistics stay"


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
