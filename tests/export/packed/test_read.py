"""Whatever is wrong with a file is said by name, and nothing of it is executed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file
from torch import Tensor, nn

from nipq.errors import ConfigError, FileFormatError
from nipq.export.packed_read import load
from nipq.export.packed_write import NO_CHECKSUM, save, with_checksum
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

Contents = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture
def path(mixed: Any, tmp_path: Path) -> Path:
    return save(convert(mixed.model), tmp_path / "model")


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["nipq"])
    change(tensors, record)
    write(path, tensors, record)


def write(path: Path, tensors: dict[str, Tensor], record: Any) -> None:
    """A file whose checksum is right: what is wrong with it is in what it says."""
    path.write_bytes(with_checksum(to_bytes(tensors, {"nipq": json.dumps(record | {"sha256": NO_CHECKSUM})})))


def stem(record: dict[str, Any]) -> dict[str, Any]:
    layer = record["layers"]["stem"]
    assert isinstance(layer, dict)
    return layer


def bare_stem(tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    stem(record).pop("batchnorm")
    tensors["stem.scale"].neg_()


def all_ones(tensors: dict[str, Tensor], _record: dict[str, Any]) -> None:
    tensors["stem.planes"].fill_(255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, r: r.update(format="other"), "expected a file of format 'nipq-packed'"),
        (lambda t, r: r.update(version=4, nipq="9.9"), r"expected format version 3, found 4.*wrote it \(9.9\)"),
        (lambda t, r: r.pop("version"), "expected format version 3, found None"),
        (lambda t, r: r.pop("layers"), "valid dictionary"),
        (lambda t, r: stem(r).update(bits=1), r"stem: expected bits: .*greater than or equal to 2, found 1"),
        (lambda t, r: stem(r).update(bits=17), r"stem: expected bits: .*less than or equal to 16, found 17"),
        (lambda t, r: stem(r)["input"].update(bits=40), r"stem: expected input\.bits: .*found 40"),
        (lambda t, r: stem(r)["input"].update(grid="cubic"), r"stem: expected input\.grid: .*found 'cubic'"),
        (lambda t, r: stem(r)["input"].update(zero_point=70000), "stem: expected a zero point of a signed grid"),
        (lambda t, r: stem(r).update(surprise=1), "stem: expected surprise: Extra inputs are not permitted"),
        (lambda t, r: stem(r).update(bits=stem(r)["bits"] + 1), "stem: expected planes of"),
        (lambda t, r: stem(r).update(shape=[8, 3, 3]), r"stem: expected a Conv2d with a weight of shape \[8, 3, 3\]"),
        (lambda t, r: stem(r).update(kind="Conv3d"), "stem: expected a Conv3d with .* found a Conv2d"),
        (lambda t, r: stem(r).update(tied_to="head"), "stem: expected its weight to be that of another layer"),
        (lambda t, r: stem(r).update(tied_to="nobody"), "stem: .*found 'nobody'"),
        (lambda t, r: stem(r).update(tied_to="stem"), "stem: .*found 'stem'"),
        (lambda t, r: stem(r).update(batchnorm="gone"), "gone: expected the model to have this module"),
        (lambda t, r: stem(r).update(batchnorm="norm"), "norm: expected a batch norm to fold, found a LayerNorm"),
        (lambda t, r: stem(r).update(batchnorm=""), "expected a batch norm to fold, found a Mixed"),
        (lambda t, r: (stem(r).pop("input"), stem(r).pop("batchnorm"), stem(r).update(bias=True)), "a layer with bias"),
        (lambda t, r: stem(r).update(shape=[1] * 9), "stem: expected shape: .*at most 5 items"),
        (lambda t, r: r["layers"].update(extra=r["layers"]["stem"]), "extra: expected the model to have this module"),
        (lambda t, r: r["layers"].pop("stem"), r"stem\.\w+: expected the (model|file) to have this tensor"),
        (lambda t, r: t.pop("stem.planes"), r"stem: expected the tensor 'stem\.planes' in the file, found none"),
        (lambda t, r: t.pop("stem.scale"), r"stem: expected the tensor 'stem\.scale' in the file, found none"),
        (lambda t, r: t.pop("norm.weight"), r"norm\.weight: expected the file to have this tensor"),
        (lambda t, r: t.update(odd=torch.zeros(1)), "odd: expected the model to have this tensor"),
        (lambda t, r: t.update({"norm.weight": torch.ones(9)}), r"norm\.weight: expected torch.float32 \(8,\)"),
        (lambda t, r: t.update({"norm.weight": torch.ones(8).half()}), r"norm\.weight: .*found torch.float16 \(8,\)"),
        (lambda t, r: t.update({"stem.scale": torch.ones(1)}), "stem: expected scale of 8 float32 numbers"),
        (lambda t, r: t["stem.scale"].fill_(float("nan")), "stem: expected scale finite"),
        (lambda t, r: t["stem.offset"][0].fill_(float("inf")), "stem: expected offset finite"),
        (lambda t, r: t["stem.input_step"].zero_(), "stem: expected input_step finite and above 0"),
        (bare_stem, "stem: expected scale finite and above 0"),
        (all_ones, "stem: expected codes from"),
    ],
)
def test_damage_is_named(
    path: Path, mixed: Any, change: Callable[[dict[str, Tensor], dict[str, Any]], object], message: str
) -> None:
    rewrite(path, change)
    with pytest.raises(FileFormatError, match=message) as caught:
        load(path, mixed.build())
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_off_is_refused_wherever_it_is_cut(path: Path, mixed: Any) -> None:
    data = path.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match="expected a whole safetensors file"):
            load(path, mixed.build())


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="expected a packed model file, found none"):
        load(tmp_path / "nothing", nn.Linear(2, 2))


@pytest.mark.parametrize("data", [b"PK\x03\x04 a pickle inside", np.arange(99).tobytes()])
def test_another_kind_of_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="expected a whole safetensors file"):
        load(path, nn.Linear(2, 2))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"nipq": "[]"}, {"nipq": "null"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model"
    save_file({"weight": torch.zeros(2, 2)}, path, metadata)
    with pytest.raises(FileFormatError, match="expected a file of format 'nipq-packed'"):
        load(path, nn.Linear(2, 2))


def test_metadata_that_are_not_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file({"weight": torch.zeros(2, 2)}, path, {"nipq": "{"})
    with pytest.raises(FileFormatError, match="metadata: expected JSON"):
        load(path, nn.Linear(2, 2))


def test_another_architecture_is_refused_by_the_modules_name(path: Path, mixed: Any) -> None:
    other = mixed.build()
    other.head = nn.Linear(8, 6)
    with pytest.raises(FileFormatError, match=r"head: expected a Linear with a weight of shape \[5, 8\]"):
        load(path, other)
    other.head = nn.Identity()
    with pytest.raises(FileFormatError, match="head: expected a Linear"):
        load(path, other)


@pytest.mark.parametrize("more", [{"input": {"bits": 8, "grid": "signed", "zero_point": 0}}, {"batchnorm": "2"}])
def test_a_table_has_no_input_and_no_batch_norm(tmp_path: Path, more: dict[str, Any]) -> None:
    net, ids = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.tensor([1, 2])
    prepared = calibrate_(prepare_(copy.deepcopy(net), ids), [ids])
    set_bits_(prepared, 4)
    path = save(convert(prepared), tmp_path / "model")
    rewrite(path, lambda t, r: (r["layers"]["0"].update(more), t.update({"0.input_step": torch.ones(1)})))
    with pytest.raises(FileFormatError, match="0: expected a table without input and batch norm"):
        load(path, net)


def test_the_float_model_is_left_as_it_was(path: Path, mixed: Any) -> None:
    model = mixed.build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load(path, model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_prepared_or_deployed_model_is_refused(path: Path, mixed: Any) -> None:
    for model in (mixed.model, convert(mixed.model)):
        with pytest.raises(ConfigError, match="expected a plain float Mixed"):
            load(path, model)
