"""The packed file: exact, as small as promised, and never half written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import nn

from nipq.errors import ConfigError
from nipq.export.packed_read import load
from nipq.export.packed_write import contents, file_bytes, fixed_bytes, header_bytes, save
from nipq.functional.packing import payload_bytes
from nipq.nn.deployed import DeployedLayer, deployed_layers
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import layer_table, quantizers

Get = Callable[..., Any]


@torch.no_grad()
def test_a_round_trip_is_exact(every: Any, tmp_path: Path) -> None:
    deployed = convert(every.model)
    path = save(deployed, tmp_path / "model.nipq.safetensors")
    torch.manual_seed(99)  # a float model with other weights
    loaded = load(path, every.build())
    assert torch.equal(loaded(every.inputs), deployed(every.inputs))
    state = loaded.state_dict()
    assert state.keys() == deployed.state_dict().keys()
    for key, value in deployed.state_dict().items():
        assert value.dtype == state[key].dtype
        assert torch.equal(value, state[key]), key
    for name, layer in deployed_layers(deployed).items():
        other = deployed_layers(loaded)[name]
        assert (other.weight_bits, other.tied_to, other.kind) == (layer.weight_bits, layer.tied_to, layer.kind)
        if isinstance(layer, DeployedLayer):
            facts = ("input_bits", "grid", "zero_point", "code_low", "code_high", "batchnorm", "float64")
            assert [getattr(other, fact) for fact in facts] == [getattr(layer, fact) for fact in facts]
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_bytes_on_disk_are_the_promised_ones(every: Any, tmp_path: Path) -> None:
    """fixed_bytes of the trained model + bits * ceil(N / 8) over its weights, each once."""
    weights = {row.weight: row for row in layer_table(every.model)}
    payload = sum(payload_bytes(row.spec.weight_count, weight.bits_rounded) for weight, row in weights.items())
    deployed = convert(every.model)
    size = save(deployed, tmp_path / "model").stat().st_size
    assert size == file_bytes(deployed) == fixed_bytes(every.model) + payload


def test_fixed_bytes_do_not_depend_on_the_bits(get: Get) -> None:
    """Learned or frozen, few or many: the digits of bit-widths, zero points and offsets change, the length does not."""
    found = {fixed_bytes(get("mixed", freeze=False).model)}
    draw = random.Random(0)
    for bits in (2, 3, 8, 9, 16, None):
        model = get("mixed", freeze=False).model
        for quantizer in quantizers(model):
            if not quantizer.is_frozen:
                quantizer.freeze_bits_(bits or draw.randint(2, 16))
        deployed = convert(model)
        found.add(fixed_bytes(model))
        payload = sum(payload_bytes(v.weight_codes.numel(), v.weight_bits) for v in deployed_layers(deployed).values())
        tensors, metadata = contents(deployed)
        found.add(len(to_bytes(tensors, metadata)) - payload)
    assert len(found) == 1


DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda s: s != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 12), max_size=3)),
        min_size=1,
        max_size=8,
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
def test_the_header_is_as_long_as_safetensors_writes_it(
    tensors: dict[str, tuple[torch.dtype, list[int]]], text: str
) -> None:
    made = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    data = to_bytes(made, {"nipq": text})
    written = int.from_bytes(data[:8], "little")
    assert len(data[8 : 8 + written].rstrip(b" ")) == header_bytes(made, {"nipq": text})


def test_equal_models_make_equal_files(mixed: Any, tmp_path: Path) -> None:
    first = save(convert(mixed.model), tmp_path / "a").read_bytes()
    assert first == save(convert(mixed.model), tmp_path / "b").read_bytes()


def test_other_programs_can_read_it(mixed: Any, tmp_path: Path) -> None:
    """By the format's description alone: a safetensors file with planes, and JSON under one key."""
    deployed = convert(mixed.model)
    path = save(deployed, tmp_path / "model")
    with safe_open(path, "np") as file:
        record = json.loads(file.metadata()["nipq"])
        planes = file.get_tensor("stem.planes")
    layer = record["layers"]["stem"]
    assert (record["format"], record["version"]) == ("nipq-packed", 3)
    assert layer["input"] == {"bits": 8, "grid": deployed.stem.grid, "zero_point": deployed.stem.zero_point}
    codes = torch.zeros(deployed.stem.weight_codes.numel(), dtype=torch.int64)
    for i in range(layer["bits"]):
        for j in range(codes.numel()):
            codes[j] += ((int(planes[i, j // 8]) >> (j % 8)) & 1) << i
    codes -= 2 ** (layer["bits"] - 1) - 1
    assert torch.equal(codes.reshape(layer["shape"]), deployed.stem.weight_codes.long())


def test_an_existing_file_is_kept_unless_told_otherwise(mixed: Any, tmp_path: Path) -> None:
    deployed, path = convert(mixed.model), tmp_path / "model"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="expected a name that is free, found the file"):
        save(deployed, path)
    assert path.read_text() == "precious"
    save(deployed, path, overwrite=True)
    assert path.stat().st_size == file_bytes(deployed)


def test_nothing_is_left_behind_when_writing_fails(mixed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    deployed, path = convert(mixed.model), tmp_path / "model"
    path.write_text("precious")
    monkeypatch.setattr("nipq.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(deployed, path, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert path.read_text() == "precious"


def test_a_folder_that_does_not_exist_is_refused(mixed: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the folder .* to exist"):
        save(convert(mixed.model), tmp_path / "nowhere" / "model")


def test_a_model_without_deployed_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save: expected a deployed model, found a Linear without"):
        save(nn.Linear(2, 2), tmp_path / "model")


def test_state_that_no_file_can_hold_is_refused_by_name(mixed: Any, tmp_path: Path) -> None:
    deployed = convert(mixed.model)
    deployed.norm.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"norm\.phase: expected a tensor of a plain type .* found torch.complex64"):
        save(deployed, tmp_path / "model")


def test_a_tied_weight_lies_in_the_file_once(get: Get, tmp_path: Path) -> None:
    path = save(convert(get("tied").model), tmp_path / "model")
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert {name for name in names if name.endswith("planes")} == {"first.planes", "table.planes"}


def test_moving_a_model_to_another_type_does_not_untie_its_file(get: Get, tmp_path: Path) -> None:
    deployed = convert(get("tied").model)
    before = file_bytes(deployed)
    deployed.second.layer.weight = deployed.second.layer.weight.clone()  # what .to(device) does
    assert save(deployed, tmp_path / "model").stat().st_size == before
