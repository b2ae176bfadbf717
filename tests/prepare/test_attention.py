"""``Config(attention_bits=...)`` through the library: counted, searched, rounded, deployed, proven, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import nipq
from nipq.budget.budget import AverageBits, BitOps
from nipq.budget.hawq import sensitivities
from nipq.budget.hessian import float_copy, layers, stored_weights
from nipq.config import Config, Rule
from nipq.errors import ConfigError, FileFormatError, NotQuantizableError
from nipq.nn.deployed import deployed_products
from nipq.prepare.layer_table import layer_table, set_bits_, set_phase_
from nipq.prepare.prepare import prepare_, restore_
from nipq.prepare.validate import validate
from nipq.qat.calibrate import calibrate_
from nipq.qat.search import Search
from nipq.report.summary import summary
from tests.prepare.attention_net import MIX, SCORES, Attention, Net, X, prepared


class Eager(Attention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out((query @ key.transpose(-1, -2)).softmax(-1) @ value)


def test_products_stand_in_the_table_where_they_run() -> None:
    rows = layer_table(prepared())
    assert [row.name for row in rows] == ["inner.qkv", SCORES, MIX, "inner.out"]
    scores, mix = rows[1].spec, rows[2].spec
    assert (scores.kind, scores.macs, scores.activation_count, scores.other_count) == (
        "QueryKey",
        2 * 6 * 6 * 8,
        96,
        96,
    )
    assert (mix.kind, mix.macs, mix.activation_count, mix.other_count) == ("ProbabilityValue", 2 * 6 * 6 * 8, 72, 96)
    assert (scores.output_count, mix.output_count) == (72, 96)
    assert scores.weight_count == mix.weight_count == 0
    names = [quantizer.name for row in rows[1:3] for quantizer in (row.input, row.weight)]
    assert names == [f"{SCORES}.query", f"{SCORES}.key", f"{MIX}.probability", f"{MIX}.value"]
    assert rows[2].input.grid.kind == "unsigned"


def test_without_the_option_attention_is_listed_as_float() -> None:
    findings = {(f.name, f.reason.split(":")[0]) for f in validate(Net(), X) if f.severity == "float"}
    assert findings == {("inner", "scaled_dot_product_attention")}
    findings = {(f.name, f.reason.split(":")[0]) for f in validate(Net(), X, Config(attention_bits=8))}
    assert findings == {("inner", "softmax")}
    assert len(layer_table(prepared(Config()))) == 2


def test_keys_and_values_count_among_activations() -> None:
    model = prepared(Config(attention_bits=(2, 8)))
    weights, inputs, operations = (AverageBits(weights=4, activations=4) & BitOps("1 M")).limits(model)
    total = 96 + 96 + 72 + 96 + 96
    assert weights.form.weight.tolist() == [0.75, 0, 0, 0.25]
    assert inputs.denominator == total
    assert inputs.form.weight.tolist() == [0, 96 / total, 96 / total, 0]
    assert inputs.form.activation.tolist() == [0, 96 / total, 72 / total, 96 / total]
    assert operations.form.product.tolist() == [6 * 768, 576, 576, 6 * 256]
    assert summary(model).activation_bits == 5.0
    assert summary(model).weight_payload_bytes == 640


def test_bits_by_hand_and_by_rule() -> None:
    set_bits_(model := prepared(), {"*": {"weights": 3, "activations": 6}})
    bits = {row.name: (row.weight.bits_rounded, row.input.bits_rounded) for row in layer_table(model)}
    assert bits == {"inner.qkv": (3, 6), SCORES: (6, 6), MIX: (6, 6), "inner.out": (3, 6)}
    set_bits_(model, 5)
    assert layer_table(model)[1].weight.bits_rounded == 5
    ruled = prepared(Config(attention_bits=8, rules=[Rule("*.mix", activation_bits=4), Rule("*", weight_bits=3)]))
    assert [row.weight.bits_rounded for row in layer_table(ruled)] == [3, 8, 4, 3]
    both = Config(attention_bits=8, rules=[Rule("*.attention_products.*", quantize=False)])
    assert len(layer_table(prepared(both))) == 2
    with pytest.raises(ConfigError, match=r"scores: expected both products of an attention to be quantized or neither"):
        prepared(Config(attention_bits=8, rules=[Rule("*.mix", quantize=False)]))


def test_from_search_to_file(tmp_path: Path) -> None:
    model = prepared()
    budget = AverageBits(weights=4, activations=4)
    search = Search(model, budget, 2)
    (model.train()(X).square().mean() + search.penalty()).backward()
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert untouched == ["inner.qkv.quantization.input.alpha_raw"]  # the model's own input's, as calibrated
    assignment = nipq.freeze_bits_(model, budget)
    assert {f"{SCORES}.query", f"{SCORES}.key", f"{MIX}.probability", f"{MIX}.value"} < assignment.bits.keys()
    set_phase_(model, "round")
    deployed = nipq.convert(model)
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    result = nipq.verify(model, deployed, [X], file=path)
    assert result, str(result)
    assert [check.name[:2] for check in result.checks] == ["E0", "E1", "E2", "E3"]
    assert torch.equal(nipq.load(path, Net())(X), deployed(X))
    assert path.stat().st_size == result.checks[0].numbers["bytes_promised"]
    copied = prepared()
    copied.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copied.eval()(X), model.eval()(X))


@pytest.mark.parametrize("part", ["step", "bits"])
def test_a_changed_operand_is_noticed(part: str) -> None:
    set_bits_(model := prepared(), 4)
    deployed = nipq.convert(model)
    key = deployed_products(deployed)[SCORES].y
    if part == "step":
        key.step.mul_(1 + 2e-7)
    else:
        key.bits += 1
    result = nipq.verify(model, deployed, [X])
    assert not result
    assert result.checks[0].first_difference.startswith(f"{SCORES}: y: {part}")


def test_a_float_checkpoint_loads_strictly_and_restore_gives_the_model_back() -> None:
    model = prepared()
    model.load_state_dict(Net().state_dict(), strict=True)
    assert restore_(model) is model
    assert list(model.state_dict()) == list(Net().state_dict())
    assert torch.equal(model(X), Net()(X))


def test_files_that_need_no_package_hold_it(tmp_path: Path) -> None:
    """Of ONNX files see ``tests/verify/test_products.py``."""
    set_bits_(model := prepared(), 4)
    deployed = nipq.convert(model)
    files = [tmp_path / name for name in ("model.pt2", "model.npz")]
    for path in files:
        nipq.export(deployed, path, X)
    assert nipq.verify(model, *files, loader=[X])


def test_attention_of_another_kind_is_refused_by_name() -> None:
    eager = nn.Sequential(Eager())
    with pytest.raises(
        NotQuantizableError, match=r"error: 0: it computes attention by products and a softmax of its own"
    ):
        prepare_(eager, X, Config(attention_bits=8))
    prepare_(eager, X)
    fused = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    with pytest.raises(NotQuantizableError, match=r"self_attn: it computes attention by torch's fused .*sdpa"):
        prepare_(fused, X, Config(attention_bits=8))
    with pytest.raises(NotQuantizableError, match="attention_bits is set, and no module calls scaled_dot_product"):
        prepare_(nn.Sequential(nn.Linear(16, 4)), X, Config(attention_bits=8))
    wrapped = Net()
    wrapped.inner.forward = wrapped.inner.forward
    with pytest.raises(NotQuantizableError, match=r"inner: the forward of this very module was replaced"):
        prepare_(wrapped, X, Config(attention_bits=8))


class Attending(nn.Linear):
    """A layer with a weight whose own forward computes attention."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return scaled_dot_product_attention(y, y, y)


def test_attention_in_the_forward_of_a_layer_is_listed_and_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), Attending(16, 16))
    with pytest.raises(NotQuantizableError, match=r"error: 1: a layer with a weight computes attention .* around it"):
        prepare_(model, X, Config(attention_bits=8))
    assert ("1", "float") in {(finding.name, finding.severity) for finding in validate(model, X)}
    prepare_(model, X, Config(attention_bits=8, rules=[Rule("1.attention_products*", quantize=False)]))
    assert not [row for row in layer_table(model) if row.spec.is_product]


class Around(Net):
    """Attention of its own, and a child's."""

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, self.inner(x), x)


def test_float_attention_inside_a_quantized_one_is_refused_by_name() -> None:
    with pytest.raises(
        NotQuantizableError, match=r"error: 0\.inner: it stays float and runs inside the attention of 0"
    ):
        prepare_(nn.Sequential(Around()), X, Config(attention_bits=8, rules=[Rule("*.inner.att*", quantize=False)]))
    with pytest.raises(NotQuantizableError, match=r"inner: it stays float .* attention of the model \(Around\)"):
        prepare_(Around(), X, Config(attention_bits=8, rules=[Rule("inner.att*", quantize=False)]))
    for config in (Config(attention_bits=8), Config(attention_bits=8, rules=[Rule("0.att*", quantize=False)])):
        calls: list[str] = []
        model = calibrate_(prepare_(nn.Sequential(Around()), X, config), [X])
        products = [row for row in layer_table(model) if row.spec.is_product]
        for row in products:
            row.layer.register_forward_hook(lambda *_, name=row.name, calls=calls: calls.append(name))
        model(X)
        assert sorted(calls) == sorted(row.name for row in products)


def test_a_file_with_half_an_attention_is_refused(tmp_path: Path) -> None:
    set_bits_(model := prepared(), 4)
    deployed = nipq.convert(model)
    del deployed.inner.attention_products.mix
    deployed.inner.attention_products.mix = nn.Identity()
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    with pytest.raises(FileFormatError, match=r"scores: expected both products of an attention"):
        nipq.load(path, Net())


@pytest.mark.parametrize(
    ("target", "bits", "said"),
    [
        ("openvino", 8, None),
        ("inductor", 8, "which Inductor computes in floats, exactly and slowly"),
        ("onnxruntime", (2, 16), None),
    ],
)
def test_a_target_says_what_it_makes_of_attention(target: str, bits: Any, said: str | None) -> None:
    findings = validate(Net(), X, Config(attention_bits=bits, target=target))
    notes = {finding.name: finding.reason for finding in findings if "inside attention" in finding.reason}
    assert list(notes) == ([] if said is None else [SCORES, MIX])
    assert all(said in note for note in notes.values())


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact", "diffq", "ste"])
def test_other_methods_quantize_attention_too(method: str) -> None:
    bits = dict.fromkeys(("weight_bits", "activation_bits", "attention_bits"), 4)
    model = prepared(Config(method=method, **bits)).train()
    model(X).square().mean().backward()
    set_bits_(model, 4)
    set_phase_(model, "round")
    assert nipq.verify(model, nipq.convert(model), [X])


def test_half_precision_around_it_changes_no_code_of_the_deployed_model() -> None:
    model = prepared().train()
    with torch.autocast("cpu", torch.bfloat16):
        model(X).float().square().mean().backward()
    set_bits_(model, 4)
    deployed = nipq.convert(model)
    expected = deployed(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(deployed(X), expected)


def test_measurements_look_at_layers_and_leave_attention_alone() -> None:
    assert list(layers(prepared())) == list(layers(Net())) == ["inner.qkv", "inner.out"]
    model = nn.Sequential(nn.Embedding(4, 16), Net())
    assert list(stored_weights(model)) == ["1.inner.qkv.weight", "1.inner.out.weight"]
    with torch.no_grad():
        assert torch.allclose(float_copy(prepared(), quantized=False)(X), Net()(X), atol=1e-6)
    with pytest.raises(ConfigError, match=rf"{SCORES}: expected attention of fixed bit-widths"):
        sensitivities(prepared(), [(X, X)], nn.functional.mse_loss)
