"""Plain arrays: NumPy alone computes what the deployed model computes, to the bit."""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nipq.export import arrays_reference as reference
from nipq.export.api import export
from nipq.export.arrays import arrays_bytes
from nipq.nn.deployed import deployed_layers

each_layer = st.lists(
    st.tuples(
        st.integers(2, 16),
        st.integers(2, 16),
        st.sampled_from(["signed", "unsigned", "shifted"]),
        st.sampled_from([1, 2]),
    ),
    min_size=7,
    max_size=7,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(drawn=each_layer, batch=st.integers(1, 3))
def test_the_reference_is_exact_for_every_kind_of_layer(
    zoo: SimpleNamespace, tmp_path_factory: Any, drawn: list[Any], batch: int
) -> None:
    model = zoo.deployed([zoo.numbers(*numbers) for numbers in drawn])
    path = tmp_path_factory.mktemp("arrays") / "zoo.npz"
    export(model, path, zoo.inputs(2))
    layers = reference.load(path)
    for name, (x, y) in zoo.calls_of(model, zoo.inputs(batch)).items():
        np.testing.assert_array_equal(reference.run(layers[name], x.numpy()), y.numpy(), name)
        largest = np.abs(reference.sums(layers[name], reference.codes(layers[name], x.numpy()))).max()
        assert largest < 2 ** (layers[name]["sum_bits"] - 1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        nn.Conv2d(4, 8, (3, 5), padding="same", groups=4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(4, 6, 3, stride=3, padding=1, output_padding=(2, 1), dilation=(1, 2), groups=2),
    ],
    ids=["stride_padding_dilation", "same", "reflect", "replicate", "circular", "transposed"],
)
def test_every_setting_of_a_convolution(
    zoo: SimpleNamespace, tmp_path: Path, picture: Tensor, layer: nn.Module
) -> None:
    model = zoo.alone(layer, zoo.numbers(5, 6, "shifted"))
    export(model, tmp_path / "conv.npz", picture)
    found = reference.run(reference.load(tmp_path / "conv.npz")["0"], picture.numpy())
    np.testing.assert_array_equal(found, model(picture).numpy())


def test_a_requested_output_size_is_part_of_the_padding(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor) -> None:
    class Upsized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = zoo.alone(nn.ConvTranspose2d(4, 6, 3, stride=2))[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[14, 11])

    model = Upsized()
    export(model, tmp_path / "up.npz", picture)
    found = reference.run(reference.load(tmp_path / "up.npz")["up"], picture.numpy())
    np.testing.assert_array_equal(found, model(picture).numpy())


def test_the_smallest_accumulator_is_reached(zoo: SimpleNamespace, tmp_path: Path) -> None:
    """``sum_bits`` is no wider than needed: inputs that follow the weight's signs reach past half of it."""
    model = zoo.alone(nn.Linear(7, 6), zoo.numbers(8, 8, "signed"))
    layer = deployed_layers(model)["0"]
    x = layer.weight_codes.sign().float() * 100
    export(model, tmp_path / "linear.npz", x)
    facts = reference.load(tmp_path / "linear.npz")["0"]
    largest = np.abs(reference.sums(facts, reference.codes(facts, x.numpy()))).max()
    assert 2 ** (facts["sum_bits"] - 2) <= largest < 2 ** (facts["sum_bits"] - 1)


def test_facts_can_be_read_without_numpy(conv: nn.Module, tmp_path: Path, picture: Tensor) -> None:
    export(conv, tmp_path / "conv.npz", picture)
    with zipfile.ZipFile(tmp_path / "conv.npz") as archive:
        facts = json.loads(archive.read("nipq.json"))
    assert (facts["format"], facts["version"]) == ("nipq-arrays", 1)
    layer = facts["layers"]["0"]
    assert (layer["kind"], layer["weight_bits"], layer["input_bits"], layer["grid"]) == ("Conv2d", 4, 5, "unsigned")
    assert (layer["input_shape"], layer["output_shape"]) == ([4, 6, 5], [6, 6, 5])
    assert layer["padding"] == [[1, 1], [1, 1]]


def test_what_stays_float_is_in_the_file(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = nn.Sequential(zoo.alone(nn.Linear(7, 6)), nn.LayerNorm(6), nn.Linear(6, 2).to(torch.bfloat16))
    model[2].forward = lambda x: x
    model.requires_grad_(False)
    export(model, tmp_path / "model.npz", torch.randn(2, 7))
    with np.load(tmp_path / "model.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["1.weight"], model[1].weight)
        np.testing.assert_array_equal(file["2.weight"], model[2].weight.float())
        assert file["0.0.weight"].dtype == np.int8


def test_tied_weights_are_there_once(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = nn.Sequential(zoo.alone(nn.Linear(7, 7)), zoo.alone(nn.Linear(7, 7)))
    model[1][0].layer.weight, model[1][0].tied_to = model[0][0].weight_codes, "0.0"
    export(model, tmp_path / "tied.npz", torch.randn(2, 7))
    layers = reference.load(tmp_path / "tied.npz")
    assert layers["1.0"]["arrays"]["weight"] == layers["0.0"]["arrays"]["weight"] == "0.0.weight"


def test_equal_models_make_equal_files(conv: nn.Module, picture: Tensor) -> None:
    assert arrays_bytes(conv, picture) == arrays_bytes(conv, picture + 1)


class Doubled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_forward_of_its_own_is_named_and_refused(zoo: SimpleNamespace, tmp_path: Path, picture: Tensor) -> None:
    report = export(zoo.alone(Doubled(4, 6, 3)), tmp_path / "model.npz", picture)
    assert report.warnings == ("0: its class has a forward of its own, which the NumPy reference does not compute",)
    with pytest.raises(ValueError, match="a forward of its own"):
        reference.run(reference.load(tmp_path / "model.npz")["0"], picture.numpy())


def test_a_float_input_is_refused(zoo: SimpleNamespace, tmp_path: Path) -> None:
    model = nn.Sequential(zoo.deployed([zoo.numbers(input_bits=None)] * 7).layers["Linear"])
    export(model, tmp_path / "model.npz", torch.randn(2, 7))
    with pytest.raises(ValueError, match="input is float"):
        reference.run(reference.load(tmp_path / "model.npz")["0"], np.zeros((2, 7), np.float32))


def test_the_reference_needs_numpy_alone() -> None:
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"numpy"}
