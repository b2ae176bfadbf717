"""Deployed, saved, loaded and exported: every kind of layer, bit-width and grid comes out as it went in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nipq.export.api import export
from nipq.export.arrays import arrays_bytes
from nipq.export.onnx_write import onnx_bytes
from nipq.export.packed_read import load
from nipq.export.packed_write import save

each_layer = st.lists(
    st.tuples(
        st.integers(2, 16),
        st.one_of(st.none(), st.integers(2, 16)),
        st.sampled_from(["signed", "unsigned", "shifted"]),
        st.sampled_from([1, 2]),
    ),
    min_size=7,
    max_size=7,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=each_layer)
def test_what_is_loaded_exports_the_same(zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any]) -> None:
    model, again = reloaded(zoo, tmp_path_factory, drawn)
    inputs = zoo.inputs(2)
    for found, expected in zip(again(*inputs), model(*inputs), strict=True):
        assert torch.equal(found, expected)
    assert arrays_bytes(again, inputs) == arrays_bytes(model, inputs)


@settings(max_examples=1, deadline=None, derandomize=True)
@given(drawn=each_layer)
def test_what_is_loaded_makes_the_same_graphs(zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any]) -> None:
    pytest.importorskip("onnxscript")
    model, again = reloaded(zoo, tmp_path_factory, drawn)
    inputs = zoo.inputs(2)
    assert onnx_bytes(again, inputs, pack=True) == onnx_bytes(model, inputs, pack=True)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(drawn=each_layer, batch=st.integers(1, 3))
def test_a_program_computes_the_same_bits(
    zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any], batch: int
) -> None:
    model = zoo.deployed([zoo.numbers(*numbers) for numbers in drawn])
    report = export(model, tmp_path_factory.mktemp("program") / "zoo.pt2", zoo.inputs(1))
    inputs = zoo.inputs(batch)
    program = torch.export.load(report.path).module()
    for found, expected in zip(program(*inputs), model(*inputs), strict=True):
        assert torch.equal(found, expected)


def reloaded(zoo: SimpleNamespace, folders: Any, drawn: list[Any]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A zoo, and the same from its packed file."""
    numbers = [zoo.numbers(*each) for each in drawn]
    model, path = zoo.deployed(numbers), folders.mktemp("packed") / "zoo.nipq.safetensors"
    save(model, path)
    return model, load(path, zoo.undeployed([each.groups for each in numbers]))
