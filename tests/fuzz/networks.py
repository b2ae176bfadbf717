"""Random small networks: every seed makes one, with what real networks do that trips quantizers up."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nipq.config import BitRange, Config, Rule
from nipq.prepare.teacher_forcing import float_results

# ---------------------------------------------------------------------- layers with a forward of their own


class Masked(nn.Conv2d):
    """A weight with a mask."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.4).float())

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class Gained(nn.Conv2d):
    """An output with a learned gain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Rectified(nn.Conv2d):
    """An activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class Residual(nn.Conv2d):
    """A residual sum inside."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + x if y.shape == x.shape else y


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Normed(nn.Conv2d):
    """A norm and an activation inside, as in detectron2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)
        self.activation = functional.relu

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.activation(self.norm(x))


class Equalised(nn.Conv2d):
    """A scaled weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight * 0.3, self.bias, self.stride, self.padding)


class Centred(nn.Conv2d):
    """A norm of the input before the operation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean((2, 3), keepdim=True))


class Padded(nn.Conv2d):
    """Padding by hand: still linear."""

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel_size[0]
        return functional.conv2d(functional.pad(x, (0, kernel // 2, kernel // 2, 0)), self.weight, self.bias)


class Doubled(nn.Conv2d):
    """A method of torch's overridden."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias) * 2


class Offset(nn.Conv2d):
    """Attributes with names like those of deployed layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.offset, self.scale, self.layer, self.codes = 2, 3.0, "name", None


OWN_CONVS: dict[str, type[nn.Conv2d]] = {
    "plain": nn.Conv2d,
    "masked": Masked,
    "gain": Gained,
    "activation inside": Rectified,
    "residual inside": Residual,
    "standardised weight": Standardised,
    "norm inside": Normed,
    "scaled weight": Equalised,
    "centred input": Centred,
    "own padding": Padded,
    "overridden method": Doubled,
    "names like ours": Offset,
}


class ScaledEmbedding(nn.Embedding):
    """Rows times a buffer, as in Gemma."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width)
        self.register_buffer("embed_scale", torch.tensor(width**0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class Positions(nn.Embedding):
    """Positions from a mask, as in OPT and BART."""

    def __init__(self, rows: int, width: int) -> None:
        self.offset = 2
        super().__init__(rows + self.offset, width)

    def forward(self, mask: Tensor, past: int = 0) -> Tensor:
        positions = (torch.cumsum(mask, 1) * mask).long() - 1
        return super().forward(positions[:, past:] + self.offset)


class GainedLinear(nn.Linear):
    """An output with a learned gain."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


# ---------------------------------------------------------------------- networks


@dataclass
class Result:
    """Results in an object."""

    logits: Tensor
    features: Tensor
    extras: list[Tensor] = field(default_factory=list)


#: Results of a model, by the form they come in.
RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda logits, _: logits,
    "tuple": lambda logits, features: (logits, features),
    "dict": lambda logits, features: {"features": features, "logits": logits},
    "dataclass": Result,
    "loss first": lambda logits, features: (logits.square().mean(), logits, features),
}


@dataclass
class Network:
    """A network and all that is needed to take it through the whole path.

    Attributes:
        seed: makes it.
        build: builds it, the same one each time.
        inputs: of its forward.
        batch: of a loader.
        config: settings.
        features: what it has, by name.
        steps: what its forward does, to be read.
        dtype: of its parameters.
    """

    seed: int
    build: Callable[[], nn.Module]
    inputs: Any
    batch: Any
    config: Config
    features: list[str]
    steps: list[str]
    dtype: torch.dtype

    def __repr__(self) -> str:
        return f"seed {self.seed}, {self.dtype}, {self.config.method}:\n  " + "\n  ".join(self.steps)


class Interpreted(nn.Module):
    """A network whose forward goes through a list of steps.

    Args:
        steps: name of a step, name of a module, and further values.
        result: form of the results.
        second: whether a second input is added.
    """

    def __init__(self, steps: list[tuple[Any, ...]], result: str, second: bool) -> None:
        super().__init__()
        self.steps, self.result, self.second = steps, result, second
        self.last: Tensor | None = None
        self.containers: dict[str, Any] = {}

    def forward(self, x: Tensor, other: Tensor | None = None) -> Any:
        kept: dict[str, Tensor] = {}
        extras: list[Tensor] = []
        for step, name, *rest in self.steps:
            x = self.take(step, name, rest, x, kept, extras)
        features = x
        if x.ndim == 4:
            x = x.mean((2, 3))
        elif x.ndim == 3:
            x = x.mean(1)
        if self.second and other is not None:
            x = x + self.side(other)
        results = RESULTS[self.result](self.head(x), features)
        return (results, extras) if extras else results

    def take(
        self, step: str, name: str, rest: list[Any], x: Tensor, kept: dict[str, Tensor], extras: list[Tensor]
    ) -> Tensor:
        match step:
            case "call":
                return self.get_submodule(name)(x)
            case "call by keyword":
                return self.get_submodule(name)(input=x)
            case "container":
                return self.containers[name][rest[0]](x)
            case "by hand":
                return self.get_submodule(name).forward(x)
            case "keep":
                kept[name] = x
            case "hold":
                self.last = x
            case "add":
                return x + kept[name]
            case "add in place":
                x += kept[name]
            case "concatenate":
                return torch.cat([x, kept[name]], 1)
            case "function":
                return getattr(functional, name)(x)
            case "function in place":
                return getattr(functional, name)(x, inplace=True)
            case "zero columns":
                x[..., :2] = 0
            case "zero a view":
                x.view(x.shape[0], -1)[:, :3].fill_(0)
            case "slice":
                return x[..., 1:]
            case "weight elsewhere":
                return functional.conv2d(x, self.get_submodule(name).weight, padding="same")
            case "transposed weight":
                return functional.conv_transpose2d(x, self.get_submodule(name).weight, padding=1)
            case "bias elsewhere":
                bias = self.get_submodule(name).bias
                return x if bias is None else x + bias.mean()
            case "auxiliary head":
                if self.training:
                    extras.append(self.get_submodule(name)(x).mean())
            case "auxiliary slice":
                if self.training:
                    extras.append(self.get_submodule(name)[: rest[0]](x).clamp(max=0).mean())
                return self.get_submodule(name)(x)
            case "iterate":
                for module in self.get_submodule(name):
                    x = module(x)
                return x
            case "embed":
                return self.get_submodule(name)(x)
            case "positions":
                return x + self.get_submodule(name)(torch.ones(x.shape[:2], dtype=torch.long))
            case "attend":
                query, key, value = (part[:, None] for part in self.get_submodule(name)(x).chunk(3, -1))
                return x + functional.scaled_dot_product_attention(query, key, value)[:, 0]
            case _:
                raise AssertionError(step)
        return x


class Maker:
    """Makes one network.

    Args:
        seed: decides everything.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.draw = seed, random.Random(seed)
        self.modules: dict[str, Callable[[], nn.Module]] = {}
        self.after: list[Callable[[Interpreted], None]] = []
        self.steps: list[tuple[Any, ...]] = []
        self.features: list[str] = []
        self.result = self.draw.choice([*RESULTS, "tensor", "tensor"])
        self.second = self.draw.random() < 0.2

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def add(self, feature: str | None, *step: Any) -> None:
        self.steps.append(step)
        if feature is not None:
            self.features.append(feature)

    def module(self, build: Callable[[], nn.Module], stem: str) -> str:
        name = f"{stem}{len(self.modules)}"
        self.modules[name] = build
        return name

    def make(self) -> Network:
        kind = self.draw.choice(["image"] * 6 + ["signal", "volume", "tokens", "tokens", "table"])
        x, width = getattr(self, kind)()
        rows = 4
        other = torch.randn(rows, 3, generator=torch.Generator().manual_seed(self.seed))
        dtype = torch.float32
        if kind != "tokens" and self.chance(0.1):
            dtype = self.draw.choice([torch.float64, torch.bfloat16])
            x, other = x.to(dtype), other.to(dtype)
            self.features.append(str(dtype))
        steps, result, second = list(self.steps), self.result, self.second
        modules, after, seed = dict(self.modules), list(self.after), self.seed

        def build() -> nn.Module:
            torch.manual_seed(seed)
            network = Interpreted(steps, result, second)
            for name, make in modules.items():
                network.add_module(name, make())
            network.head = nn.Linear(width, 5)
            if second:
                network.side = nn.Linear(3, width)
            for change in after:
                change(network)
            with torch.no_grad():
                for module in network.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                        module.running_mean.normal_(0, 0.2)
                        module.running_var.uniform_(0.5, 2)
                        if module.affine:
                            module.weight.normal_(0, 1)
            return network.to(dtype)

        inputs: Any = x
        batch: Any = (x, torch.arange(rows) % 5)
        if self.second:
            inputs = {"x": x, "other": other} if self.chance(0.5) else (x, other)
            batch = {**inputs, "labels": batch[1]} if isinstance(inputs, dict) else (*inputs, batch[1])
        texts = [" ".join(map(str, step)) for step in steps]
        return Network(self.seed, build, inputs, batch, self.config(), self.features, texts, dtype)

    def config(self) -> Config:
        settings: dict[str, Any] = {"granularity": self.draw.choice(["tensor", "channel"])}
        settings["method"] = self.draw.choice(["nipq"] * 5 + ["lsq", "lsq+", "pact", "diffq", "ste"])
        learns = settings["method"] in ("nipq", "lsq", "diffq")
        weights = [BitRange(fixed=4), *([BitRange(), BitRange(min=3, max=6)] if learns else [])]
        inputs = [BitRange(fixed=6), *([BitRange(), BitRange(allowed=(4, 8))] if learns else [])]
        settings |= {"weight_bits": self.draw.choice(weights), "activation_bits": self.draw.choice(inputs)}
        if self.chance(0.15):
            settings["quantize_inputs"] = False
        if self.chance(0.2):
            settings["rules"] = (Rule("head", quantize=False),)
        if "attention" in self.features and self.chance(0.5):
            settings["attention_bits"] = BitRange(fixed=8)
        return Config(**settings)

    # ------------------------------------------------------------------ families

    def image(self) -> tuple[Tensor, int]:
        channels, size = self.draw.choice([2, 3, 4]), self.draw.choice([6, 7, 8])
        x = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(self.seed))
        for _ in range(self.draw.randint(2, 4)):
            channels = self.block(channels)
        return x, channels

    def block(self, channels: int) -> int:
        """A convolution with what may stand around it."""
        out = self.draw.choice([3, 4, 6])
        kernel = self.draw.choice([1, 3])
        own = self.draw.choice([*OWN_CONVS, *["plain"] * 14])
        settings: dict[str, Any] = {"padding": kernel // 2, "bias": self.chance(0.6)}
        if own == "plain":
            self.plain_settings(settings, channels)
            out = out if settings.get("groups", 1) == 1 else channels * self.draw.choice([1, 2])
        conv = self.module(partial(OWN_CONVS[own], channels, out, kernel, **settings), "conv")
        same = channels == out and settings.get("stride", 1) == 1 and own != "own padding"
        residual = same and self.chance(0.4)
        if residual:
            self.add("residual sum", "keep", conv)
        self.reach(conv, own)
        if own == "plain" and kernel == 3 and settings.get("groups", 1) == 1 and self.chance(0.08):
            self.elsewhere(conv, channels, out)
            if self.steps[-1][0] == "transposed weight":
                out = channels
                residual = False
        self.between()
        name = None
        if self.chance(0.6):
            name = self.module(partial(nn.BatchNorm2d, out), "norm")
            self.add(None, "call by keyword" if self.chance(0.1) else "call", name)
            if self.chance(0.08):
                self.alias(name)
        elif self.chance(0.3):
            name = self.module(
                self.draw.choice([partial(nn.GroupNorm, 1, out), partial(nn.InstanceNorm2d, out)]), "norm"
            )
            self.add("other norm", "call", name)
        self.between()
        if residual:
            self.add("sum in place" if self.chance(0.5) else None, self.draw.choice(["add", "add in place"]), conv)
        self.activation()
        if self.chance(0.12):
            self.auxiliary(out)
        if self.chance(0.12):
            self.add("slice", "slice", "")
        if self.chance(0.1):
            self.add("concatenation", "keep", f"cat{len(self.steps)}")
            pool = self.module(partial(nn.AvgPool2d, 3, 1, 1), "pool")
            self.add(None, "call", pool)
            self.add(None, "concatenate", self.steps[-2][1])
            out = 2 * out
        if self.chance(0.1):
            out = self.sequence(out)
        return out

    def plain_settings(self, settings: dict[str, Any], channels: int) -> None:
        if self.chance(0.15):
            settings["groups"] = channels
            self.features.append("depthwise")
        if self.chance(0.15):
            settings["stride"] = 2
        if self.chance(0.15):
            settings["padding_mode"] = self.draw.choice(["reflect", "replicate", "circular"])
            self.features.append("padding mode")
        elif self.chance(0.1):
            settings["dilation"], settings["padding"] = 2, "same" if settings.get("stride", 1) == 1 else 2

    def reach(self, conv: str, own: str) -> None:
        """One call of a convolution, by one of the ways in which models reach their layers."""
        if own != "plain":
            self.features.append(own)
        roll = self.draw.random()
        if roll < 0.06:
            kind = self.draw.choice(["list", "tuple", "dict"])
            self.after.append(
                lambda network: network.containers.__setitem__(conv, _container(kind, network.get_submodule(conv)))
            )
            self.add(f"kept in a {kind}", "container", conv, 0)
        elif roll < 0.08:
            self.after.append(
                lambda network: network.containers.__setitem__(conv, [_closure(network.get_submodule(conv))])
            )
            self.add("kept in a closure", "container", conv, 0)
        elif roll < 0.1:
            self.add("called by hand", "by hand", conv)
        elif roll < 0.13 and own == "plain":
            self.add("input by name", "call by keyword", conv)
        else:
            self.add(None, "call", conv)
            if roll > 0.96:
                self.alias(conv)

    def alias(self, name: str) -> None:
        self.features.append("two names")
        self.after.append(lambda network: network.add_module(f"alias_of_{name}", network.get_submodule(name)))

    def elsewhere(self, conv: str, channels: int, out: int) -> None:
        roll = self.draw.random()
        if roll < 0.3 and channels == out:
            self.add("weight read elsewhere", "weight elsewhere", conv)
        elif roll < 0.6:
            self.add("weight read by a decoder", "transposed weight", conv)
        else:
            self.add("bias read elsewhere", "bias elsewhere", conv)

    def between(self) -> None:
        """Operations that may stand between a convolution, its batch norm and its activation."""
        roll = self.draw.random()
        if roll < 0.05:
            self.add("slice written", "zero columns", "")
        elif roll < 0.07:
            self.add("view written", "zero a view", "")
        elif roll < 0.1:
            self.add("tensor held", "hold", "")
        elif roll < 0.13:
            self.add("function in place", "function in place", "relu")

    def activation(self) -> None:
        roll = self.draw.random()
        if roll < 0.5:
            kind = self.draw.choice([nn.ReLU, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU])
            in_place = kind is nn.ReLU and self.chance(0.5)
            self.add(None, "call", self.module(partial(kind, inplace=True) if in_place else kind, "act"))
        elif roll < 0.8:
            self.add(None, "function", self.draw.choice(["relu", "gelu", "hardswish", "sigmoid"]))
        if self.chance(0.1):
            self.add("dropout", "call", self.module(partial(nn.Dropout, 0.3), "drop"))

    def auxiliary(self, channels: int) -> None:
        head = self.module(partial(_auxiliary, channels), "aux")
        self.add("auxiliary head", "auxiliary head", head)

    def sequence(self, channels: int) -> int:
        """A container of neighbours, which a branch of training may read a part of."""

        def build() -> nn.Module:
            parts = (nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
            return nn.Sequential(*parts, nn.Conv2d(4, 4, 1))

        name = self.module(build, "seq")
        roll = self.draw.random()
        if roll < 0.4:
            self.add("auxiliary slice", "auxiliary slice", name, self.draw.choice([3, 5]))
        elif roll < 0.6:
            self.add("iterated sequence", "iterate", name)
        else:
            self.add("sequence", "call", name)
        return 4

    def signal(self) -> tuple[Tensor, int]:
        self.features.append("one axis")
        x = torch.randn(4, 3, 12, generator=torch.Generator().manual_seed(self.seed))
        shape = self.draw.choice([{}, {"stride": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
        first = self.module(partial(nn.Conv1d, 3, 4, 3, **shape), "conv")
        self.add(None, "call", first)
        if self.chance(0.5):
            self.add(None, "call", self.module(partial(nn.BatchNorm1d, 4), "norm"))
        self.activation()
        if self.chance(0.5):
            self.add("transposed", "call", self.module(partial(nn.ConvTranspose1d, 4, 4, 2, stride=2, groups=1), "up"))
            self.activation()
        if self.chance(0.3):
            self.add("called twice", "call", self.module(partial(nn.Conv1d, 4, 4, 1), "twice"))
            self.add(None, "call", self.steps[-1][1])
        self.add(None, "call", self.module(_Swapped, "swap"))
        return x, 4

    def volume(self) -> tuple[Tensor, int]:
        self.features.append("three axes")
        x = torch.randn(4, 2, 4, 4, 4, generator=torch.Generator().manual_seed(self.seed))
        self.add(None, "call", self.module(partial(nn.Conv3d, 2, 4, 2), "conv"))
        if self.chance(0.5):
            self.add(None, "call", self.module(partial(nn.BatchNorm3d, 4), "norm"))
        self.activation()
        if self.chance(0.5):
            self.add("transposed", "call", self.module(partial(nn.ConvTranspose3d, 4, 4, 2, groups=1), "up"))
        self.add(None, "call", self.module(partial(nn.Flatten, 2), "flat"))
        self.add(None, "call", self.module(_Swapped, "swap"))
        return x, 4

    def tokens(self) -> tuple[Tensor, int]:
        x = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(self.seed))
        table = self.draw.choice([nn.Embedding, nn.Embedding, ScaledEmbedding])
        if table is ScaledEmbedding:
            self.features.append("scaled embedding")
        self.add("embedding", "embed", self.module(partial(table, 11, 8), "table"))
        if self.chance(0.4):
            self.add("positions from a mask", "positions", self.module(partial(Positions, 12, 8), "places"))
        for _ in range(self.draw.randint(1, 2)):
            if self.chance(0.6):
                self.add("attention", "attend", self.module(partial(nn.Linear, 8, 24), "qkv"))
            if self.chance(0.5):
                self.add(None, "call", self.module(partial(nn.LayerNorm, 8), "norm"))
            kind = self.draw.choice([nn.Linear, nn.Linear, GainedLinear])
            if kind is GainedLinear:
                self.features.append("gain")
            self.add(None, "call", self.module(partial(kind, 8, 8, bias=self.seed % 2 == 0), "mlp"))
            self.activation()
        if self.chance(0.3):
            self.features.append("tied to the table")
            self.add(None, "call", self.module(partial(nn.Linear, 8, 11, bias=False), "tied"))
            tied, source = self.steps[-1][1], self.steps[0][1]
            self.after.append(lambda network: _tie(network.get_submodule(tied), network.get_submodule(source)))
            return x, 11
        return x, 8

    def table(self) -> tuple[Tensor, int]:
        self.features.append("linear layers")
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.seed))
        width = 6
        for _ in range(self.draw.randint(1, 3)):
            kind = self.draw.choice([nn.Linear, nn.Linear, nn.Linear, GainedLinear])
            if kind is GainedLinear:
                self.features.append("gain")
            self.add(None, "call", self.module(partial(kind, width, 8), "mlp"))
            width = 8
            if self.chance(0.5):
                self.add(None, "call", self.module(partial(nn.BatchNorm1d, 8), "norm"))
            self.activation()
            if self.chance(0.2):
                self.add("called twice", "call", self.module(partial(nn.Linear, 8, 8), "twice"))
                self.add(None, "call", self.steps[-1][1])
        return x, width


class _Swapped(nn.Module):
    """Channels last, as the mean over the rest expects them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _auxiliary(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 2, 1), nn.BatchNorm2d(2))


def _container(kind: str, layer: nn.Module) -> Any:
    return {"list": [layer], "tuple": (layer,), "dict": {0: layer}}[kind]


def _closure(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)


def _tie(layer: nn.Linear, table: nn.Embedding) -> None:
    layer.weight = table.weight


def network(seed: int) -> Network:
    """The network of a seed; one that cannot be trained as it is in floats makes way for another."""
    for attempt in range(100):
        made = Maker(seed + 1_000_000 * attempt).make()
        try:
            results = made.build().train()(**made.inputs) if isinstance(made.inputs, dict) else _trained(made)
            torch.stack([result.float().sum() for result in float_results(results)]).sum().backward()
        except (RuntimeError, ValueError):  # an operation in place on what backward needs
            continue
        return dataclasses.replace(made, seed=seed)
    raise AssertionError(f"no network for seed {seed}")


def _trained(made: Network) -> Any:
    inputs = made.inputs if isinstance(made.inputs, tuple) else (made.inputs,)
    return made.build().train()(*(tensor.clone() for tensor in inputs))
