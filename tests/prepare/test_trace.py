from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nipq.errors import NotQuantizableError
from nipq.nn.layers import LayerSpec
from nipq.prepare.trace import trace


def specs(model: nn.Module, x: object) -> dict[str, LayerSpec]:
    return {spec.name: spec for spec in trace(model, x).layers}


def pieces(model: nn.Module, x: object) -> set[tuple[str, str, int]]:
    return {(piece.name, piece.operation, piece.count) for piece in trace(model, x).unquantized_ops}


# ---------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "weights", "inputs", "outputs"),
    [
        (nn.Linear(6, 4), (1, 6), 24, 24, 6, 4),
        (nn.Linear(6, 4), (1, 10, 6), 240, 24, 60, 40),
        (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 5, 7), 3 * 8 * 9 * 35, 216, 105, 280),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), (1, 4, 6, 6), 8 * 9 * 9, 72, 144, 72),
        (nn.Conv1d(2, 3, 5, dilation=2), (1, 2, 20), 2 * 3 * 5 * 12, 30, 40, 36),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 2 * 8 * 8, 16, 27, 16),
        # Every one of the 9 input pixels meets the whole kernel.
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 3), 4 * 6 * 4 * 9, 96, 36, 216),
    ],
)
def test_counts_of_a_layer(
    layer: nn.Module, shape: tuple[int, ...], macs: int, weights: int, inputs: int, outputs: int
) -> None:
    for batch in (1, 3):
        spec = specs(nn.Sequential(layer), torch.randn(batch, *shape[1:]))["0"]
        counts = (spec.macs, spec.weight_count, spec.activation_count, spec.output_count)
        assert counts == (macs, weights, inputs, outputs)
        assert spec.kind == type(layer).__name__


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.cell(x))
        return x


def test_calls_add_up_and_unused_layers_are_listed() -> None:
    traced = trace(Recurrent(), torch.randn(2, 4))
    (cell,) = traced.layers
    assert (cell.calls, cell.macs, cell.activation_count, cell.weight_count) == (3, 48, 12, 16)
    assert not cell.is_input  # only the first of its calls reads the model's input
    assert traced.unused == ("spare",)


def test_order_is_that_of_execution() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Linear(2, 2)
            self.first = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    assert [spec.name for spec in trace(Backwards(), torch.randn(1, 2)).layers] == ["first", "second"]


# ---------------------------------------------------------------------- the model's own input


class Branches(nn.Module):
    """Two layers read the (normalised) input, one reads features, one reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.5))
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.deep, self.mixed = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25 + torch.zeros_like(x)
        left, right = self.left(x[:, :4]), self.right(functional.max_pool1d(x, 1))
        return self.mixed(x + self.deep(left + right))


def test_which_layers_read_the_models_own_input() -> None:
    found = {name: spec.is_input for name, spec in specs(Branches(), torch.randn(2, 4)).items()}
    assert found == {"left": True, "right": True, "deep": False, "mixed": False}


def test_an_embedding_is_not_the_models_own_input() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    found = specs(model, torch.tensor([[1, 2, 3]]))
    assert not found["1"].is_input
    assert not found["0"].is_input


def test_a_table_is_looked_up_and_not_multiplied_with() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    model[1].weight = model[0].weight
    table, layer = specs(model, torch.tensor([[1, 2, 3]])).values()
    assert (table.macs, table.activation_count, table.weight_count, table.output_count) == (0, 0, 40, 12)
    assert table.is_table
    assert not layer.is_table
    assert table.tied_to == "1"
    assert layer.tied_to is None
    assert not pieces(model, torch.tensor([[1, 2, 3]]))


def test_a_table_that_is_no_module_of_its_own_stays_float() -> None:
    model = nn.Sequential(nn.EmbeddingBag(10, 4), nn.Linear(4, 2))
    assert ("0", "embedding_bag", 1) in pieces(model, torch.tensor([[1, 2, 3]]))


def test_an_addition_in_place_makes_features_of_the_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x += self.a(x)
            return self.b(x)

    found = specs(InPlace(), torch.randn(1, 3))
    assert found["a"].is_input
    assert not found["b"].is_input


# ---------------------------------------------------------------------- batch norms that can be folded


class Normalised(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(2, 3, 1)
        self.bn = nn.BatchNorm2d(3, track_running_stats=kind != "no statistics")
        if kind == "subclass":
            self.bn = ActivatedNorm(3)

    def forward(self, x: Tensor) -> object:
        y = self.conv(x)
        if self.kind == "changed between":
            y = y + 1
        if self.kind == "changed in place":
            y += 1
        z = self.bn(y)
        if self.kind == "read twice":
            z = z + y
        if self.kind == "norm twice":
            z = self.bn(z)
        if self.kind == "called twice":
            z = z + self.conv(x)
        return (z, y) if self.kind == "returned" else z


class ActivatedNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize(
    ("kind", "folded"),
    [
        ("plain", "bn"),
        ("changed between", None),
        ("changed in place", None),
        ("read twice", None),
        ("norm twice", None),
        ("called twice", None),
        ("returned", None),
        ("no statistics", None),
        ("subclass", None),
    ],
)
def test_a_batch_norm_is_folded_only_where_that_is_exact(kind: str, folded: str | None) -> None:
    assert specs(Normalised(kind), torch.randn(1, 2, 4, 4))["conv"].batchnorm == folded
    named = ("bn", "batch_norm") in {piece[:2] for piece in pieces(Normalised(kind), torch.randn(1, 2, 4, 4))}
    assert named == (folded is None)


#: Operations in it are called past Python.
SCRIPTED = torch.jit.CompilationUnit("def double(y):\n    return y.sum() * 2\n")


@dataclasses.dataclass
class Result:
    y: Tensor
    z: Tensor


class Watched(nn.Module):
    """A convolution and a batch norm, with one more reader or writer of what is between them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.bn, self.bn1 = how, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm1d(4)
        self.seen: list[Tensor] = []
        match how:
            case "hook":
                self.conv.register_forward_hook(lambda _m, _x, y: self.seen.append(y))
            case "replacing hook":
                self.conv.register_forward_hook(lambda _m, _x, y: y * 2)
            case "hook on the norm":
                self.bn.register_forward_hook(lambda _m, _x, y: y * 2)

    def forward(self, x: Tensor) -> object:
        if self.how == "trains itself":
            self.bn.train()
        y = self.conv(x)
        match self.how:
            case "slice":
                y[..., :1] = 0
            case "data":
                y.data.mul_(2)
            case "numpy":
                y.numpy()[:] = 0
            case "out":
                torch.add(x, 1, out=y)
            case "another name":
                torch.ops.aten.add_(y, 1)
            case "read by another name":
                torch.ops.aten.sum(y)
            case "scripted":
                SCRIPTED.double(y)
            case "attribute":
                self.last = y
            case "alias":
                self.last = y.detach()
            case "other axes":
                return self.bn1(y)
        z = self.bn(input=y)
        match self.how:
            case "dataclass":
                return Result(y, z)
            case "norm's weight":
                return z + self.bn.weight.sum()
            case "norm's weight looked at":
                return z if self.bn.weight is not None else y
            case "norm's statistics":
                return functional.batch_norm(x, self.bn.running_mean, self.bn.running_var)
            case "norm by hand":
                return z + self.bn.forward(x)
            case "bias looked at":
                return z if self.conv.bias is not None else None
            case "weight":
                return functional.conv_transpose2d(z, self.conv.weight)
        return z.to(self.conv.weight.dtype)  # nothing of its values


WRITERS = ["slice", "data", "numpy", "out", "another name"]
READERS = ["read by another name", "scripted", "attribute", "alias", "dataclass", "hook", "replacing hook"]
NORMS = ["norm's weight", "norm's weight looked at", "norm's statistics", "norm by hand", "hook on the norm"]
OTHERS = ["bias looked at", "weight", "trains itself"]


@pytest.mark.parametrize("how", ["nothing", *WRITERS, *READERS, *NORMS, *OTHERS])
def test_a_batch_norm_is_not_folded_where_anything_else_reads_or_writes(how: str) -> None:
    found = specs(Watched(how), torch.randn(2, 4, 3, 3))
    assert found["conv"].batchnorm == ("bn" if how == "nothing" else None)


def test_a_batch_norm_over_another_axis_is_not_folded() -> None:
    assert specs(Watched("other axes"), torch.randn(4, 4, 4))["conv"].batchnorm is None  # no batch: axis 1 is height
    assert specs(Watched("nothing"), torch.randn(4, 4, 4, 4))["conv"].batchnorm == "bn"


def test_readers_of_a_weight_are_told_from_those_that_pass_the_layer_by() -> None:
    class Reading(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how, self.layer, self.inner = how, nn.Linear(3, 3), nn.Identity()
            self.listed = [self.layer.weight]
            self.inner.register_forward_hook(lambda _m, _x, y: y @ self.layer.weight if how == "hook" else None)
            if how == "tied":
                self.own = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(self.layer(x))
            match self.how:
                case "list":
                    return x @ self.listed[0]
                case "parameters":
                    return x + sum(parameter.sum() for parameter in self.parameters())
                case "tied":
                    return x @ self.own
            return x

    found = {how: trace(Reading(how), torch.randn(1, 3)) for how in ("nothing", "hook", "list", "parameters", "tied")}
    assert {how: traced.weight_readers.get("layer") for how, traced in found.items()} == {
        "nothing": None,
        "hook": ("inner",),
        "list": ("",),
        "parameters": ("",),
        "tied": ("",),
    }
    assert [how for how, traced in found.items() if traced.past] == ["list", "parameters"]


def test_forwards_that_are_called_directly() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.direct, self.called = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.called(self.direct.forward(self.both.forward(self.both(x))))

    model = Direct()
    traced = trace(model, torch.randn(1, 3))
    assert traced.by_hand == {"both", "direct"}
    assert traced.unused == ("direct",)
    convolution = nn.Conv2d(3, 3, 1)
    inner = type("Inner", (nn.Module,), {"forward": lambda s, x: s.c._conv_forward(s.c(x), s.c.weight, s.c.bias)})()
    inner.c = convolution
    assert trace(inner, torch.randn(1, 3, 2, 2)).by_hand == {"c"}
    assert "_conv_forward" not in vars(convolution)
    assert traced.weight_readers == {}  # they read their own
    assert not any("forward" in vars(module) for module in model.modules())
    assert type(model.both._parameters) is dict


def test_checkpointed_layers_are_called_as_ever() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.bn(self.conv(x)), x, use_reentrant=False)

    found = specs(Checkpointed(), torch.randn(2, 4, 3, 3))
    assert (found["conv"].calls, found["conv"].batchnorm) == (1, "bn")


def test_a_batch_norm_behind_a_linear_layer_needs_two_dimensions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert specs(model, torch.randn(5, 4))["0"].batchnorm == "1"
    assert specs(model, torch.randn(5, 4, 4))["0"].batchnorm is None  # there the channels are axis 1


# ---------------------------------------------------------------------- what stays float


class Pieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.table = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        y = y + x
        y = y * torch.sigmoid(y)
        y = self.scale * y
        y = (y * 2 + 1) / 3 - 4  # numbers are no activations
        y = functional.max_pool2d(y, 2)
        y = functional.adaptive_avg_pool2d(y, 1).flatten(1)
        y = functional.linear(y, self.table)
        return torch.cat([functional.relu(y), y @ y.mT], dim=1)


def test_functional_ops_are_found_by_name_and_counted() -> None:
    assert pieces(Pieces(), torch.randn(2, 2, 4, 4)) == {
        ("", "add", 2),
        ("", "mul", 2),
        ("", "sigmoid", 1),
        ("", "max_pool2d", 1),
        ("", "adaptive_avg_pool2d", 1),
        ("", "linear", 1),
        ("", "matmul", 1),
    }


def test_every_piece_has_a_reason_and_the_module_it_happens_in() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.LayerNorm(4)), nn.Softmax(dim=1))
    traced = trace(model, torch.randn(2, 4))
    found = {piece.name: piece for piece in traced.unquantized_ops}
    assert {name: piece.operation for name, piece in found.items()} == {
        "1.0": "gelu",
        "1.1": "layer_norm",
        "2": "softmax",
    }
    assert "next layer quantizes" in found["1.0"].reason


def test_attention_is_named_and_its_projection_is_unused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    traced = trace(Attention(), torch.randn(1, 3, 4))
    assert traced.unused == ("attention.out_proj",)
    assert ("attention", "multi_head_attention_forward") in {(p.name, p.operation) for p in traced.unquantized_ops}
    assert [spec.name for spec in traced.layers] == ["head"]


# ---------------------------------------------------------------------- calling, and leaving no trace


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_inputs_come_in_three_forms(form: str) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.layer(x if y is None else x + y)

    x = torch.randn(2, 3)
    inputs = {"tensor": x, "tuple": (x, x), "dict": {"y": x, "x": x}}[form]
    assert specs(TwoInputs(), inputs)["layer"].is_input


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()).train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model, torch.randn(2, 1, 5, 5))
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_fails_is_named() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2)).train()
    with pytest.raises(NotQuantizableError, match=r"^1: expected a forward that accepts.*\[\(2, 5\)\].*Pass inputs"):
        trace(model, torch.randn(2, 5))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Diffusion(nn.Module):
    """Called with a time step first, as denoisers are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = self.layer(x) * t
        return y if context is None else y + context.sum()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "first", [torch.tensor(5.0), torch.ones(1), torch.ones(1, 1)], ids=["no axis", "one element", "one row"]
)
@pytest.mark.parametrize("context", [None, torch.ones(7, 5)], ids=["two inputs", "three inputs"])
def test_the_batch_size_is_not_that_of_a_time_step(first: Tensor, context: Tensor | None, batch: int) -> None:
    spec = specs(Diffusion(), (first, torch.randn(batch, 3), *([] if context is None else [context])))["layer"]
    assert (spec.macs, spec.activation_count, spec.output_count) == (9, 3, 3)


def test_lists_of_images_have_as_many_samples_as_the_list_of_results() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": self.conv(image).flatten()} for image in images]

    assert specs(Detector(), ([torch.randn(3, 4, 4), torch.randn(3, 4, 4)],))["conv"].macs == 6 * 16


def test_a_batch_size_that_is_not_clear_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x).sum() + self.b(y).sum()

    with pytest.raises(NotQuantizableError, match=r"as many begin with 2 as with 5\. Pass a batch of one"):
        trace(Two(), (torch.randn(2, 3), torch.randn(5, 3)))
    assert specs(Two(), (torch.randn(5, 3), torch.randn(5, 3)))["a"].macs == 9


@pytest.mark.parametrize("inputs", [(), {}, torch.tensor(1.0), ("text",)])
def test_inputs_without_a_batch_are_refused(inputs: object) -> None:
    with pytest.raises(NotQuantizableError, match="expected example inputs with a batch axis, found none"):
        trace(nn.Linear(1, 1), inputs)
