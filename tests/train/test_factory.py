"""From a name to a network: every way to be wrong has its message."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nipq.errors import ConfigError, FileFormatError
from nipq.train import models as factory
from nipq.train.config import ModelConfig
from nipq.train.factory import build_model
from nipq.train.models import digits_net, mobilenet_v2_28, resnet18_28

DIGITS = "nipq.train.models:digits_net"


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (digits_net(width=4), (2, 1, 8, 8)),
        (mobilenet_v2_28(width_mult=0.35), (2, 1, 28, 28)),
        (mobilenet_v2_28(width_mult=0.35, stem_stride=2), (2, 1, 28, 28)),
        (resnet18_28(width=4), (2, 1, 28, 28)),
    ],
    ids=["digits", "mobilenet", "mobilenet_stride2", "resnet"],
)
def test_small_nets_answer(net: nn.Module, shape: tuple[int, ...]) -> None:
    assert net(torch.randn(shape)).shape == (2, 10)


def test_narrow_resnet_is_narrow_everywhere() -> None:
    net = resnet18_28(width=8)
    widths = {m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {8, 16, 32, 64}


def test_torchvision_names_are_known() -> None:
    net = build_model(ModelConfig(factory="resnet18", kwargs={"num_classes": 3}))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "no torchvision model 'resnet19'.*resnet18"),
        ("nipq.train.models:absent", "no model factory"),
        ("no_such_package:net", "no model factory"),
        (":net", "no model factory"),
    ],
)
def test_unknown_model(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(factory=name))


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"refused the arguments.*depth"):
        build_model(ModelConfig(factory=DIGITS, kwargs={"depth": 3}))


def test_factory_must_give_a_module() -> None:
    with pytest.raises(ConfigError, match="must return a module, it gave dict"):
        build_model(ModelConfig(factory="builtins:dict"))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_weights_are_loaded(ending: str, tmp_path: Path) -> None:
    state = digits_net(width=4).state_dict()
    path = tmp_path / f"net.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save({"state_dict": state}, path)
    net = build_model(ModelConfig(factory=DIGITS, kwargs={"width": 4}, weights=str(path)))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_missing_weights_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing at"):
        build_model(ModelConfig(factory=DIGITS, weights=str(tmp_path / "absent.pt")))


def test_weights_of_another_net(tmp_path: Path) -> None:
    torch.save(digits_net(width=8).state_dict(), tmp_path / "net.pt")
    with pytest.raises(FileFormatError, match="are not those of"):
        build_model(ModelConfig(factory=DIGITS, kwargs={"width": 4}, weights=str(tmp_path / "net.pt")))


class Trap:
    """Would run code when unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("trap-was-sprung"),))


@pytest.mark.parametrize("content", ["text", "pickle", "list", "safetensors"])
def test_foreign_weights_file_runs_nothing(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("net.safetensors" if content == "safetensors" else "net.pt")
    if content in ("text", "safetensors"):
        path.write_text("not weights", encoding="utf-8")
    else:
        torch.save(Trap() if content == "pickle" else [1, 2], path)
    with pytest.raises(FileFormatError, match="net"):
        build_model(ModelConfig(factory=DIGITS, weights=str(path)))
    assert not (tmp_path / "trap-was-sprung").exists()


def test_published_weights_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise urllib.error.URLError("no connection")

    monkeypatch.setattr(factory.torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(factory.torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be fetched.*resnet18-.*\.pth"):
        build_model(ModelConfig(factory="resnet18", weights="DEFAULT"))


def test_published_weights_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory.torch.hub, "get_dir", lambda: str(tmp_path))
    net = build_model(ModelConfig(factory="squeezenet1_1"))
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    again = build_model(ModelConfig(factory="squeezenet1_1", weights="DEFAULT"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


def test_own_nets_have_no_published_weights() -> None:
    with pytest.raises(ConfigError, match="publishes no weights"):
        build_model(ModelConfig(factory=DIGITS, weights="DEFAULT"))
