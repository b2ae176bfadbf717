"""Transformers in the files of others; a decoder is exported without its cache of keys and values."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import nipq
from nipq.prepare.layer_table import set_bits_


def prepared(subject: Any, attention_bits: Any) -> nn.Module:
    model = nipq.prepare_(subject.build(), subject.batch, nipq.Config(attention_bits=attention_bits))
    nipq.calibrate_(model, [subject.batch]).eval()
    set_bits_(model, 5)
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def check(subject: Any, path: Path, attention_bits: Any = None) -> None:
    model = prepared(subject, attention_bits)
    report = nipq.export(nipq.convert(model), path, subject.batch)
    assert bool(report.products) == (attention_bits is not None)
    result = nipq.verify(model, path, loader=[subject.batch])
    assert result, str(result)


def test_arrays_hold_every_layer(subject: SimpleNamespace, tmp_path: Path) -> None:
    check(subject, tmp_path / "model.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx", "model.pt2"])
@pytest.mark.parametrize("model", ["bert", "gpt2", "vit", "swin", "llama"])
def test_graphs_hold_the_whole_model(model: str, name: str, model_named: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    check(model_named(model), tmp_path / name)


@pytest.mark.parametrize("model", ["bert", "distilbert", "llama", "timm vit"])
def test_arrays_hold_attention(model: str, model_named: Any, tmp_path: Path) -> None:
    check(model_named(model), tmp_path / "model.npz", (2, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.onnx", "model.qonnx.onnx"])
@pytest.mark.parametrize("model", ["bert", "distilbert", "vit", "timm vit", "gpt2", "llama", "swin"])
def test_graphs_hold_attention(model: str, name: str, model_named: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    check(model_named(model), tmp_path / name, (2, 8))
