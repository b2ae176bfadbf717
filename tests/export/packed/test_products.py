"""Attention in a packed file: what is wrong with it is said by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nipq.config import Config
from nipq.errors import ConfigError, FileFormatError
from nipq.export.packed_read import load
from nipq.export.packed_write import NO_CHECKSUM, fixed_bytes, save, with_checksum
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

X = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
NAME = "0.attention_products.scores"


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, self.key(x), x)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Inner(), nn.Linear(8, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    prepared = calibrate_(prepare_(model(), X, Config(attention_bits=(2, 16))), [X])
    set_bits_(prepared, 3)
    small = fixed_bytes(prepared)
    set_bits_(prepared, {"*.attention_products.*": 16})
    assert fixed_bytes(prepared) == small
    return save(convert(prepared), tmp_path / "model")


def scores(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["products"][NAME]
    return found


def move(tensors: dict[str, Tensor], record: dict[str, Any], where: str) -> None:
    """The same attention once more, with its tensors, in another module."""
    for part in ("scores", "mix"):
        old, new = f"0.attention_products.{part}", f"{where}.attention_products.{part}"
        record["products"][new] = record["products"][old]
        for key in [key for key in tensors if key.startswith(f"{old}.")]:
            tensors[key.replace(old, new)] = tensors[key].clone()


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
CHANGES: list[tuple[Change, str]] = [
    (lambda t, r: r.update(products=[]), "valid dictionary"),
    (lambda t, r: scores(r).pop("y"), rf"{NAME}: expected y: Field required"),
    (lambda t, r: scores(r)["x"].update(bits=17), rf"{NAME}: expected x\.bits: .*found 17"),
    (lambda t, r: scores(r)["y"].update(grid="cubic"), rf"{NAME}: expected y\.grid: .*found 'cubic'"),
    (lambda t, r: scores(r)["y"].update(zero_point=3), rf"{NAME}: expected a zero point of a signed grid of 16 bits"),
    (lambda t, r: scores(r).update(surprise=1), rf"{NAME}: expected surprise: Extra inputs"),
    (lambda t, r: t.pop(f"{NAME}.x.step"), rf"{NAME}: expected the tensor '{NAME}\.x\.step' in the file"),
    (lambda t, r: t[f"{NAME}.x.step"].neg_(), rf"{NAME}: expected x\.step finite and above 0"),
    (lambda t, r: t.update({f"{NAME}.y.step": torch.ones(2)}), rf"{NAME}: expected y\.step of 1 float32"),
    (lambda t, r: r["products"].pop(NAME), r"0\.attention_products\.mix: expected both products of an attention"),
    (lambda t, r: r["products"].update({"0.elsewhere.scores": scores(r)}), r"0\.elsewhere\.scores: expected both"),
    (lambda t, r: move(t, r, "9"), r"9\.attention_products\.scores: expected the model to have the module around it"),
    (lambda t, r: move(t, r, "1"), r"1\.attention_products\.scores: expected attention outside of layers, .* a Linear"),
    (lambda t, r: move(t, r, "0.key"), r"0\.key\.attention_products\.scores: expected attention outside of layers"),
    (
        lambda t, r: move(t, r, "1.layer"),
        r"1\.layer\.attention_products\.scores: expected the model to have the module",
    ),
    (lambda t, r: move(t, r, NAME), rf"{NAME}\.attention_products\.scores: expected the model to have the module"),
    (
        lambda t, r: r["products"].update({"9.attention_products.mix": 0, "9.attention_products.scores": 0}),
        "to have the",
    ),
    (lambda t, r: r["products"].update({"scores": scores(r), "mix": scores(r)}), "scores: expected both products"),
    (lambda t, r: r.pop("products"), r"attention_products\.mix\.x\.step: expected the model to have this tensor"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_is_wrong_is_said_by_name(path: Path, change: Change, message: str) -> None:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["nipq"])
    change(tensors, record)
    path.write_bytes(with_checksum(to_bytes(tensors, {"nipq": json.dumps(record | {"sha256": NO_CHECKSUM})})))
    with pytest.raises(FileFormatError, match=message):
        load(path, model())


def test_an_untouched_file_loads(path: Path) -> None:
    loaded = load(path, model())
    assert loaded[0].attention_products.scores.x.bits == 16
    assert "bits=16, grid=signed" in repr(loaded)


def test_a_forward_that_somebody_replaced_is_not_dropped(path: Path) -> None:
    wrapped = model()
    wrapped[0].forward = wrapped[0].forward
    with pytest.raises(ConfigError, match="0: expected a module with the forward of its class, found one that was"):
        load(path, wrapped)
