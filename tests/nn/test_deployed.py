"""A deployed model is a plain module: torch's tools take it, and every reference to a layer runs whole codes."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import nipq
from nipq.config import BitRange, Config, Rule
from nipq.errors import NotQuantizableError
from nipq.nn.deployed import DeployedKeptLayer, DeployedLayer, deployed_layers
from nipq.prepare.layer_table import set_phase_
from tests.models.own_forwards import Gained, Padded, ScaledTable


class Conv1D(nn.Module):
    """The transformers library's, known by its name and settings."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, self.nx), self.weight)
        return flat.view((*x.shape[:-1], self.nf))


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.up(x, output_size=[12, 12]))
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        y: Tensor = self.out(functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return y


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


DRAWN = torch.Generator().manual_seed(0)
IMAGE, ROW, TOKENS = (torch.randn(*shape, generator=DRAWN) for shape in ((4, 3, 6, 6), (4, 6), (4, 5, 6)))
IDS = torch.arange(12).reshape(4, 3) % 7
#: Few bits of activations would flip codes, and so whole levels, in half precision.
ATTENTION = Config(attention_bits=8, activation_bits=8)
#: What builds a network, its deployed form, and inputs.
Network = tuple[Callable[[], nn.Module], nn.Module, Tensor]
#: Networks with every kind of layer, and inputs.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Config]] = {
    "convolution": (lambda: image(nn.Conv2d(4, 4, 3, padding=1, groups=2)), IMAGE, Config()),
    "reflected": (lambda: image(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), IMAGE, Config()),
    "transposed": (lambda: image(nn.ConvTranspose2d(4, 4, 3, stride=2, output_padding=1)), IMAGE, Config()),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), ROW, Config()),
    "tied": (Tied, IDS, Config()),
    "table": (lambda: nn.Sequential(nn.Embedding(7, 6, padding_idx=0), nn.Linear(6, 3)), IDS, Config()),
    "scaled table": (lambda: nn.Sequential(ScaledTable(7, 6), nn.Linear(6, 3)), IDS, Config()),
    "Conv1D": (lambda: nn.Sequential(Conv1D(6, 6), nn.GELU(), Conv1D(3, 6)), ROW, Config()),
    "output size": (Resized, IMAGE, Config()),
    "attention": (Attention, TOKENS, ATTENTION),
    "attention inside": (lambda: nn.Sequential(Attention(), nn.Linear(6, 2)), TOKENS, ATTENTION),
    "one layer": (lambda: nn.Linear(6, 2), ROW, Config()),
    "one layer, kept": (lambda: Gained(3, 4, 3), IMAGE, Config()),
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
    torch._dynamo.reset()  # its limit of recompilations counts all models that went through torch's own code
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
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiler_takes_it(network: Network) -> None:
    _, deployed, x = network
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(deployed)(x), deployed(x))


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


def test_a_float_layer_that_only_a_closure_reaches_is_refused_as_its_copy_would_not_be_called() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = self.norm = nn.LayerNorm(4)
            self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 2)
            self.step = lambda x: norm(x)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.step(self.first(x)))
            return y

    with pytest.raises(NotQuantizableError, match=r"norm: .*through the function that Closed keeps as 'step'"):
        nipq.prepare_(Closed(), ROW)


def test_a_layer_that_convert_finds_shared_is_named_with_the_way_to_it() -> None:
    model = trained(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), ROW)
    first, last = model[0], model[2]
    model.forward = lambda x: last(torch.relu(first(x)))
    found = r"^0, 2: .*: 0 through the function that Sequential keeps as 'forward', .*; 2 through .*Keep layers in attr"
    with pytest.raises(NotQuantizableError, match=found):
        nipq.convert(model, ROW)


def test_a_deployed_layer_that_nothing_calls_is_missed() -> None:
    model = trained(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)), ROW)
    model.forward = types.MethodType(lambda self, x: self[2](x[:, :4]), model)
    with pytest.raises(NotQuantizableError, match=r"^0: expected a deployed model that calls every deployed layer"):
        nipq.convert(model, ROW)


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


@torch.no_grad()
def test_a_kept_layer_is_of_the_trained_class_also_in_copies() -> None:
    deployed = nipq.convert(trained(lambda: image(Gained(4, 4, 3)), IMAGE))
    for model in (deployed, copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert isinstance(model[3], Gained)
        assert isinstance(model[3], DeployedKeptLayer)


@torch.no_grad()
def test_what_is_set_on_a_deployed_layer_is_set_where_it_is_read() -> None:
    deployed = nipq.convert(trained(lambda: image(Gained(4, 4, 3)), IMAGE))
    before = deployed[3](IMAGE.new_ones(1, 4, 4, 4))
    deployed[3].gain = nn.Parameter(2 * deployed[3].gain)
    torch.testing.assert_close(deployed[3](IMAGE.new_ones(1, 4, 4, 4)), 2 * before)
    deployed[0].padding = (1, 1)
    assert deployed[0](IMAGE).shape[-2:] == IMAGE.shape[-2:]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_that_of_phase_int(dtype: torch.dtype) -> None:
    x = TOKENS.to(dtype)
    model = trained(lambda: Attention().to(dtype), x, ATTENTION)
    deployed = nipq.convert(model)
    set_phase_(model, "int")
    assert torch.equal(model(x), deployed(x))


# ---------------------------------------------------------------------- wrapped models


@torch.no_grad()
@pytest.mark.parametrize("wrap", [nn.DataParallel, AveragedModel, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_left_out(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    build = NETWORKS["linear"][0]
    model = trained(build, ROW)
    expected = nipq.convert(model)
    deployed = nipq.convert(wrap(model))
    assert set(deployed_layers(deployed)) == set(deployed_layers(expected))
    again = nipq.load(nipq.save(wrap(deployed), tmp_path / "model"), build())
    assert torch.equal(again(ROW), expected(ROW))
    assert torch.equal(nipq.load(tmp_path / "model", wrap(build()))(ROW), expected(ROW))
    assert list(nipq.load(tmp_path / "model", wrap(build())).state_dict()) == list(expected.state_dict())


@torch.no_grad()
def test_a_model_compiled_in_place_after_preparing_is_deployed_uncompiled() -> None:
    model = trained(NETWORKS["linear"][0], ROW)
    expected = nipq.convert(model)(ROW)
    model.compile(backend="eager")
    deployed = nipq.convert(model)
    assert deployed._compiled_call_impl is None
    assert torch.equal(deployed(ROW), expected)


def compiled_part(model: nn.Module) -> nn.Module:
    model[3] = torch.compile(model[3], backend="eager")
    return model


def checkpointed_part(model: nn.Module) -> nn.Module:
    model[3] = checkpoint_wrapper(model[3])
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", [compiled_part, checkpointed_part])
def test_a_wrapped_part_is_refused_by_name(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    build = NETWORKS["linear"][0]
    model = trained(build, ROW)
    deployed = nipq.convert(model)
    nipq.save(deployed, tmp_path / "model")
    refused = "3: expected parts of a model as they are"
    with pytest.raises(NotQuantizableError, match=f"convert: {refused}"):
        nipq.convert(wrap(model))
    with pytest.raises(NotQuantizableError, match=f"load: {refused}"):
        nipq.load(tmp_path / "model", wrap(build()))
    wrap(deployed)
    with pytest.raises(NotQuantizableError, match=f"save: {refused}"):
        nipq.save(deployed, tmp_path / "other")
    with pytest.raises(NotQuantizableError, match=f"export: {refused}"):
        nipq.export(deployed, tmp_path / "model.npz", ROW)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's, which wants an accelerator."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def test_a_sharded_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = trained(NETWORKS["linear"][0], ROW)
    with pytest.raises(NotQuantizableError, match=r"convert: .*sharded over processes. Load the full state dict"):
        nipq.convert(FullyShardedDataParallel(model))
    with pytest.raises(NotQuantizableError, match=r"save: .*sharded over processes"):
        nipq.save(FullyShardedDataParallel(nipq.convert(model)), tmp_path / "model")


def test_rules_keep_layers_float_beside_deployed_ones() -> None:
    model = trained(
        NETWORKS["linear"][0], ROW, Config(rules=(Rule("3", quantize=False),), weight_bits=BitRange(fixed=4))
    )
    deployed = nipq.convert(model)
    assert type(deployed[3]) is nn.Linear
    assert nipq.verify(model, deployed, loader=[ROW])
