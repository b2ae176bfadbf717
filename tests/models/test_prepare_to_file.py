"""Transformers from the shelf, unedited, from ``prepare_`` to a file that ``verify`` has proven."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.nn.attention import PRODUCTS
from nipq.prepare.batches import call_model
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.validate import validate
from nipq.qat.search import Search


def number(output: Any) -> Tensor:
    """Something to descend on."""
    found = next(v for v in (output.values() if isinstance(output, Mapping) else [output]) if v.is_floating_point())
    return found.square().mean()


def steps(model: nn.Module, batch: Any, search: Search | None, count: int = 2) -> None:
    optimizer = torch.optim.AdamW(nipq.param_groups(model, lr=1e-3))
    model.train()
    for _ in range(count):
        loss = number(call_model(model, batch))
        if search is not None:
            loss = loss + search.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if search is not None:
            search.step()
    model.eval()


def trained(subject: SimpleNamespace, config: nipq.Config | None = None) -> nn.Module:
    """Prepared, searched for two steps, frozen and fine-tuned for two."""
    model = nipq.prepare_(subject.build(), subject.batch, config)
    nipq.calibrate_(model, [subject.batch])
    budget = nipq.AverageBits(weights=5, activations=5)
    steps(model, subject.batch, Search(model, budget, 2))
    nipq.freeze_bits_(model, budget)
    set_phase_(model, "round")
    steps(model, subject.batch, None)
    return model


def test_from_prepare_to_a_proven_file(subject: SimpleNamespace, tmp_path: Path) -> None:
    model = trained(subject)
    deployed = nipq.convert(model)
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    result = nipq.verify(model, deployed, [subject.batch], file=path)
    assert result, str(result)
    assert [check.name[:2] for check in result.checks] == ["E0", "E1", "E2", "E3"]
    loaded = nipq.load(path, subject.build())
    with torch.no_grad():
        assert torch.equal(number(call_model(loaded, subject.batch)), number(call_model(deployed, subject.batch)))


def test_every_layer_and_table_is_quantized_and_the_rest_is_listed(subject: SimpleNamespace) -> None:
    findings = validate(subject.build(), subject.batch)
    assert not [finding for finding in findings if finding.severity == "error"]
    listed = {finding.reason.split(":")[0].split(" (")[0] for finding in findings if finding.severity == "float"}
    assert listed & {"scaled_dot_product_attention", "softmax"}
    assert any("normalisation stays float" in finding.reason for finding in findings)
    rows = layer_table(nipq.prepare_(subject.build(), subject.batch))
    plain = subject.build()
    tables = [name for name, module in plain.named_modules() if isinstance(module, nn.Embedding)]
    assert sum(row.spec.is_table for row in rows) == subject.embeddings == len(tables)
    linear = {name for name, module in plain.named_modules() if type(module).__name__ in ("Linear", "Conv1D", "Conv2d")}
    assert linear == {row.name for row in rows if not row.spec.is_table}


def test_a_float_state_loads_strictly_and_restore_gives_the_model_back(subject: SimpleNamespace) -> None:
    model, plain = subject.build(), subject.build()
    keys, kinds = list(plain.state_dict()), [type(module) for module in plain.modules()]
    nipq.prepare_(model, subject.batch)
    model.load_state_dict(copy.deepcopy(plain.state_dict()), strict=True)
    assert nipq.restore_(model) is model
    assert list(model.state_dict()) == keys
    assert [type(module).__name__ for module in model.modules()] == [kind.__name__ for kind in kinds]
    with torch.no_grad():
        assert torch.equal(number(call_model(model, subject.batch)), number(call_model(plain, subject.batch)))


def test_attention_too_from_prepare_to_a_proven_file(
    subject: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nipq.prepare.trace.trace(subject.build(), subject.batch).attention:  # timm's Swin multiplies by itself
        with pytest.raises(
            nipq.NipqError, match=r"layers\.0\.blocks\.0\.attn: it computes attention by .*set_fused_attn"
        ):
            nipq.prepare_(subject.build(), subject.batch, nipq.Config(attention_bits=8))
        monkeypatch.setattr(sys.modules["timm.models.swin_transformer"], "use_fused_attn", lambda **_: True)
    model = trained(subject, nipq.Config(attention_bits=(2, 8)))
    products = [row for row in layer_table(model) if row.spec.is_product]
    assert len(products) == 2 * sum("ttention" in type(m).__name__ for m in model.modules() if PRODUCTS in m._modules)
    deployed = nipq.convert(model)
    path = nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    result = nipq.verify(model, deployed, [subject.batch], file=path)
    assert result, str(result)
    loaded = nipq.load(path, subject.build())
    with torch.no_grad():
        assert torch.equal(number(call_model(loaded, subject.batch)), number(call_model(deployed, subject.batch)))


def test_eager_attention_is_refused_by_name() -> None:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = library.BertConfig(vocab_size=20, attn_implementation="eager", **sizes)
    with pytest.raises(
        nipq.NipqError, match=r'attention\.self: it computes attention by .* attn_implementation="sdpa"'
    ):
        nipq.prepare_(library.BertModel(config), {"input_ids": torch.ones(1, 4).long()}, nipq.Config(attention_bits=8))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tied_tables_are_stored_once(name: str, model_named: Any) -> None:
    subject = model_named(name)
    model = trained(subject)
    tied = [row for row in layer_table(model) if row.weight is layer_table(model)[-1].weight]
    assert [row.spec.is_table for row in tied] == [True, False]
    deployed = nipq.convert(model)
    codes = [deployed.get_submodule(row.name).weight_codes for row in tied]
    assert codes[0] is codes[1]
