"""A deployed model is a plain module: torch's tools take it, and every reference to a layer runs whole codes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nipq
from nipq.config import BitRange, Config, Rule
from nipq.errors import NotQuantizableError
from nipq.nn.deployed import DeployedKeptLayer, DeployedLayer, deployed_layers
from nipq.prepare.layer_table import set_phase_


class Gained(nn.Conv2d):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.head(torch.tanh(self.table(x)))
        return rows


def image(layer: nn.Module) -> nn.Sequential:
    first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, layer, nn.ReLU(), nn.Flatten(), nn.Linear(layer(torch.zeros(1, 4, 4, 4)).numel(), 5))


IMAGE, ROW, IDS = torch.randn(4, 3, 6, 6), torch.randn(4, 6), torch.arange(12).reshape(4, 3) % 7
#: What builds a network, its deployed form, and inputs.
Network = tuple[Callable[[], nn.Module], nn.Module, Tensor]
#: Networks with every kind of layer, and inputs.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Config]] = {
    "convolution": (lambda: image(nn.Conv2d(4, 4, 3, padding=1, groups=2)), IMAGE, Config()),
    "reflected": (lambda: image(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), IMAGE, Config()),
    "transposed": (lambda: image(nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)), IMAGE, Config()),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), ROW, Config()),
    "tied": (Tied, IDS, Config()),
    "own forward, linear": (lambda: image(Padded(4, 4, 2)), IMAGE, Config()),
    "own forward, kept": (lambda: image(Gained(4, 4, 3, padding=1)), IMAGE, Config()),
    "weights only": (lambda: image(Gained(4, 4, 3, padding=1)), IMAGE, Config(quantize_inputs=False)),
    "wide sums": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ROW, Config(weight_bits=16)),
}


def trained(build: Callable[[], nn.Module], x: Tensor, config: Config | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = nipq.prepare_(build(), x, config or Config())
    nipq.calibrate_(model, [x])
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        nipq.reestimate_bn_(model, [x])
    nipq.freeze_bits_(model, nipq.AverageBits(weights=16))
    set_phase_(model, "round")
    return model.eval()


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    build, x, config = NETWORKS[request.param]
    return build, nipq.convert(trained(build, x, config)), x


def loaded(deployed: nn.Module, x: Tensor) -> nn.Module:
    return copy.deepcopy(deployed)


def pickled(deployed: nn.Module, x: Tensor) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(deployed))
    return found


def saved(deployed: nn.Module, x: Tensor) -> nn.Module:
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def traced(deployed: nn.Module, x: Tensor) -> nn.Module:
    found: nn.Module = torch.jit.trace(deployed, x)
    return found


def exported(deployed: nn.Module, x: Tensor) -> nn.Module:
    found: nn.Module = torch.export.export(deployed, (x,)).module()
    return found


def compiled(deployed: nn.Module, x: Tensor) -> nn.Module:
    found: nn.Module = torch.compile(deployed, backend="eager", fullgraph=True)
    return found


def symbolic(deployed: nn.Module, x: Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(deployed)


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore::DeprecationWarning",
    "ignore:.torch.jit:FutureWarning",
    "ignore::FutureWarning",
)
@pytest.mark.parametrize("tool", [loaded, pickled, saved, traced, exported, compiled, symbolic])
def test_torchs_tools_take_it_and_give_the_same_bits(
    network: Network, tool: Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
) -> None:
    _, deployed, x = network
    assert torch.equal(tool(deployed, x)(x), deployed(x))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.1)])
def test_its_type_is_changed_as_that_of_any_module(network: Network, dtype: torch.dtype, close: float) -> None:
    _, deployed, x = network
    expected = deployed(x)
    codes = {name: layer.weight_codes.clone() for name, layer in deployed_layers(deployed).items()}
    other = copy.deepcopy(deployed).to(dtype)
    found = other(x.to(dtype) if x.is_floating_point() else x)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= close * expected.abs().max()
    for name, layer in deployed_layers(other).items():
        assert torch.equal(layer.weight_codes, codes[name])
        assert layer.weight.dtype == dtype


def test_its_state_goes_through_a_state_dict(network: Network) -> None:
    _, deployed, x = network
    other = copy.deepcopy(deployed)
    for value in other.state_dict().values():
        value.zero_()
    assert other.load_state_dict(deployed.state_dict(), strict=True)
    assert torch.equal(other(x), deployed(x))


def test_it_comes_back_from_its_file(network: Network, tmp_path: Path) -> None:
    build, deployed, x = network
    again = nipq.load(nipq.save(deployed, tmp_path / "model.nipq.safetensors"), build())
    assert torch.equal(again(x), deployed(x))
    assert torch.equal(pickle.loads(pickle.dumps(again))(x), deployed(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type_is_trained_deployed_and_loaded(dtype: torch.dtype, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return image(nn.Conv2d(4, 4, 3)).to(dtype)

    x = IMAGE.to(dtype)
    model = trained(build, x)
    deployed = nipq.convert(model)
    expected, found = model(x), deployed(x)
    assert found.dtype == dtype
    close = 1e-5 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    assert (found - expected).abs().max() <= close * expected.abs().max()
    assert torch.equal(nipq.load(nipq.save(deployed, tmp_path / "model"), build())(x), found)
    assert nipq.verify(model, deployed, loader=[x])


# ---------------------------------------------------------------------- references


class Kept(nn.Module):
    """Layers that are also kept in a plain container."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)]
        for number, layer in enumerate(layers):
            self.add_module(f"lateral{number}", layer)
        self.layers = {list: layers, tuple: tuple(layers), dict: dict(enumerate(layers))}[kind]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values() if isinstance(self.layers, dict) else self.layers:
            x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_layers_in_plain_containers_are_deployed(kind: type, tmp_path: Path) -> None:
    model = trained(lambda: Kept(kind), IMAGE)
    deployed = nipq.convert(model, IMAGE)
    kept = deployed.layers.values() if kind is dict else deployed.layers
    assert all(isinstance(layer, DeployedLayer) for layer in kept)
    torch.testing.assert_close(deployed(IMAGE), model(IMAGE))
    assert torch.equal(nipq.load(nipq.save(deployed, tmp_path / "model"), Kept(kind))(IMAGE), deployed(IMAGE))


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.body = nn.Sequential(self.stem, self.norm, nn.ReLU())
        self.alias = self.norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


@torch.no_grad()
def test_a_module_under_two_names_is_deployed_under_both() -> None:
    model = trained(TwoNames, IMAGE)
    deployed = nipq.convert(model)
    assert deployed.alias is deployed.norm is deployed.body[1]
    assert deployed.stem is deployed.body[0]
    assert nipq.verify(model, deployed, loader=[IMAGE])


@torch.no_grad()
def test_a_model_that_is_one_layer_is_deployed() -> None:
    model = trained(lambda: nn.Linear(6, 2), ROW)
    deployed = nipq.convert(model)
    assert isinstance(deployed, DeployedLayer)
    torch.testing.assert_close(deployed(ROW), model(ROW))


def test_a_layer_that_only_a_closure_reaches_is_refused_with_the_way_to_it() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = self.layer = nn.Linear(6, 4)
            self.head = nn.Linear(4, 2)
            self.step = lambda x: layer(x)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.step(x))
            return y

    model = Closed()
    with pytest.raises(NotQuantizableError, match=r"layer: .*through the function that Closed keeps as 'step'"):
        nipq.prepare_(model, ROW)
    assert torch.equal(model.layer(ROW), model.step(ROW))
    assert not any(hasattr(module, "quantization") for module in model.modules())


def test_a_deployed_layer_that_nothing_calls_is_named() -> None:
    model = trained(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ROW)
    model[2].register_forward_pre_hook(lambda *_call: None)
    clone = copy.deepcopy(model)
    clone.forward = lambda x: clone[1](clone[0](x))  # type: ignore[method-assign]
    with pytest.raises(NotQuantizableError, match=r"0: expected a deployed copy that runs its own layers"):
        nipq.convert(clone, ROW)


# ---------------------------------------------------------------------- what others see


@torch.no_grad()
def test_weight_and_bias_are_the_trained_ones_unless_a_batch_norm_is_in_them() -> None:
    model = trained(NETWORKS["linear"][0], ROW)
    deployed = nipq.convert(model)
    assert deployed[0].weight.isnan().all()
    assert deployed[0].bias.isnan().all()
    assert (deployed[0].weight.shape, deployed[0].weight.dtype) == ((4, 6), torch.float32)
    torch.testing.assert_close(deployed[3].weight + 0, model[3].weight + 0)
    torch.testing.assert_close(deployed[3].bias, model[3].bias)


def test_hooks_of_the_users_come_along_and_ours_do_not() -> None:
    model = trained(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ROW)
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_call: seen.append("hook"))
    deployed = nipq.convert(model)
    deployed(ROW)
    assert seen == ["hook"]
    assert not deployed[0]._forward_pre_hooks


@torch.no_grad()
def test_parts_of_a_kept_layer_are_seen_from_outside() -> None:
    deployed = nipq.convert(trained(lambda: image(Gained(4, 4, 3)), IMAGE))
    layer = deployed[3]
    assert isinstance(layer, DeployedKeptLayer)
    assert layer.gain.shape == (1,)
    assert layer.stride == (1, 1)
    with pytest.raises(AttributeError):
        _ = layer.nothing


# ---------------------------------------------------------------------- wrapped models


@torch.no_grad()
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_left_out(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    build = NETWORKS["linear"][0]
    model = trained(build, ROW)
    expected = nipq.convert(model)
    deployed = nipq.convert(wrap(model))
    assert set(deployed_layers(deployed)) == set(deployed_layers(expected))
    again = nipq.load(nipq.save(wrap(deployed), tmp_path / "model"), build())
    assert torch.equal(again(ROW), expected(ROW))
    assert nipq.verify(wrap(model), wrap(deployed), loader=[ROW])


@torch.no_grad()
def test_a_model_compiled_in_place_after_preparing_is_deployed_uncompiled() -> None:
    model = trained(NETWORKS["linear"][0], ROW)
    expected = nipq.convert(model)(ROW)
    model.compile(backend="eager")
    deployed = nipq.convert(model)
    assert deployed._compiled_call_impl is None
    assert torch.equal(deployed(ROW), expected)


def test_a_wrapped_part_is_refused_by_name() -> None:
    model = trained(NETWORKS["linear"][0], ROW)
    model[3] = torch.compile(model[3], backend="eager")
    with pytest.raises(NotQuantizableError, match="3: expected parts of a model as they are"):
        nipq.convert(model)


def test_rules_keep_layers_float_beside_deployed_ones() -> None:
    model = trained(
        NETWORKS["linear"][0], ROW, Config(rules=(Rule("3", quantize=False),), weight_bits=BitRange(fixed=4))
    )
    deployed = nipq.convert(model)
    assert type(deployed[3]) is nn.Linear
    assert nipq.verify(model, deployed, loader=[ROW])
