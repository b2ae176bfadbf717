"""Kinds of layers that have a quantized form: their channels, how often a weight is used, and shells for any weight.

Convolutions and linear layers multiply; an embedding is looked up, so its weight alone is quantized. The linear layer
of GPT-2, ``Conv1D`` of the transformers library with its weight of shape (in, out), is known by name and settings, so
that nothing has to be imported for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

#: Layers of torch with a weight and one input; subclasses with a forward of their own included.
MULTIPLYING = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
#: Methods that the forwards of these call.
_PARTS = ("_conv_forward", "_output_padding")
#: Those whose weight has its input channels first.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Conv1D(nn.Module):
    """The transformers library's linear layer with its weight the other way round: x @ weight + bias.

    It stands for the library's own class in shells, because that one cannot do without a bias.
    """

    if TYPE_CHECKING:  # what a shell is given
        nf: int
        weight: Tensor
        bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """The product, with the bias if there is one.

        Args:
            x: shape (..., in).

        Returns:
            Shape (..., out).
        """
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Class of a layer's operation: one of torch's, or a ``Conv1D``; None where nothing is quantized.

    Args:
        module: any module; a subclass with a forward of its own counts as what it derives from.

    Example:
        >>> kind_of(nn.Linear(1, 1)), kind_of(nn.ReLU())
        (<class 'torch.nn.modules.linear.Linear'>, None)
    """
    for kind in (*MULTIPLYING, nn.Embedding):
        if isinstance(module, kind):
            return kind
    plain: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return plain if plain.__name__ == Conv1D.__name__ and isinstance(getattr(module, "nf", None), int) else None


def is_supported(module: nn.Module) -> bool:
    """Return whether the weight of a module can be quantized."""
    return kind_of(module) is not None


def is_table(module: nn.Module) -> bool:
    """Return whether a layer is looked up instead of multiplied with."""
    return isinstance(module, nn.Embedding)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a layer is the transformers library's linear layer."""
    kind = kind_of(module)
    return kind is not None and kind.__name__ == Conv1D.__name__


def is_plain(layer: nn.Module) -> bool:
    """Return whether a supported layer runs the forward of its kind, not one of its own."""
    kind, own = kind_of(layer), type(layer)
    if kind is None or "forward" in vars(layer):
        return False
    return all(getattr(own, name, None) is getattr(kind, name, None) for name in ("forward", *_PARTS))


def run_operation(
    layer: nn.Module,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *args: Any,  # noqa: ANN401  (the layer's own arguments)
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """A layer's operation on any input, weight and bias.

    Args:
        layer: gives kind and settings. One with a forward of its own runs that, on the weight and bias that it has.
        x: the input.
        weight: of the shape of the layer's.
        bias: shape ``(channels,)``, or None.
        *args: the layer's other arguments.
        **kwargs: the same by name.
    """
    if not is_plain(layer):
        result: Tensor = layer.forward(x, *args, **kwargs)
        return result
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, weight, layer.padding_idx)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, bias)
    if isinstance(layer, TRANSPOSED):
        return _transposed(layer, x, weight, bias, *args, **kwargs)
    if is_conv1d(layer):
        product = x @ weight
        return product if bias is None else product + bias
    convolved: Tensor = layer._conv_forward(x, weight, bias)  # type: ignore[operator]  # or a module, to torch
    return convolved


def _transposed(
    layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: list[int] | None = None,
) -> Tensor:
    axes = len(layer.kernel_size)
    run = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[axes - 1]
    settings: Any = layer
    extra = settings.output_padding
    if output_size is not None:
        geometry = settings.stride, settings.padding, settings.kernel_size, settings.dilation
        extra = _output_padding(x, output_size, *geometry)
    return run(x, weight, bias, settings.stride, settings.padding, extra, settings.groups, settings.dilation)


def _output_padding(x: Tensor, output_size: list[int], *geometry: tuple[int, ...]) -> list[int]:
    """The extra padding for a wanted size, from stride, padding, kernel size and dilation."""
    *first, dilation = geometry
    of: Any = nn.ConvTranspose2d._output_padding  # the same for every number of axes; reads nothing of a layer here
    extra: list[int] = of(None, x, output_size, *first, len(dilation), dilation)
    return extra


fx.wrap("_output_padding")  # one call in a symbolic trace, as the whole layer is in that of a float model


def channel_dim(layer: nn.Module) -> int:
    """Axis of the layer's output that holds its channels, counted from the end so that unbatched inputs work.

    Args:
        layer: a supported layer.

    Returns:
        -1 for linear layers and embeddings, -(spatial axes + 1) for convolutions.
    """
    kernel: tuple[int, ...] = getattr(layer, "kernel_size", ())
    return -(len(kernel) + 1)


def output_channels(layer: nn.Module) -> int:
    """Number of output channels of a supported layer; of a table the number of its rows, each of which has its own."""
    names = ("num_embeddings",) if is_table(layer) else ("out_features", "out_channels", "nf")
    count = next(value for name in names if (value := getattr(layer, name, None)) is not None)
    assert isinstance(count, int)
    return count


def weight_channel_axis(layer: nn.Module) -> int:
    """Axis of the layer's weight along which its output channels lie (within a group, when transposed)."""
    return 1 if isinstance(layer, TRANSPOSED) or is_conv1d(layer) else 0


def output_channel_axis(layer: nn.Module) -> int | None:
    """Axis of a layer's weight that runs along its output channels.

    Args:
        layer: a supported layer.

    Returns:
        The axis, or None for a grouped transposed convolution, whose output channels run along two axes at once.
    """
    grouped = isinstance(layer, TRANSPOSED) and layer.groups != 1
    return None if grouped else weight_channel_axis(layer)


def weight_uses(layer: nn.Module, x: Tensor, y: Tensor) -> int:
    """Number of multiplications with the whole weight in one call, over the whole batch.

    Args:
        layer: a supported layer.
        x: its input.
        y: its output.
    """
    if is_table(layer):
        return 0  # looked up, not multiplied with
    if isinstance(layer, TRANSPOSED):
        return x.numel() // layer.in_channels  # every input pixel meets the whole kernel
    return y.numel() // output_channels(layer)


def along_channels(values: Tensor, layer: nn.Module, weight: Tensor) -> Tensor:
    """Values of the output channels, shaped to broadcast with the weight.

    Args:
        values: shape ``(channels,)``, ``(1,)`` or no dimensions.
        layer: the layer, or its shell.
        weight: its weight.

    Returns:
        As many dimensions as the weight.
    """
    if values.numel() == 1:
        return values.reshape([1] * weight.ndim)
    groups: int = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED) and groups > 1:  # a grouped transposed convolution has channels on both axes
        inputs, outputs = weight.shape[:2]
        rows = values.reshape(groups, outputs).repeat_interleave(inputs // groups, dim=0)
        return rows.reshape(inputs, outputs, *[1] * (weight.ndim - 2))
    shape = [1] * weight.ndim
    shape[weight_channel_axis(layer)] = -1
    return values.reshape(shape)


def shell_class(layer: nn.Module) -> type[nn.Module]:
    """The class whose forward runs the layer on any weight, with a bias or without."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(layer)
    return Conv1D if is_conv1d(layer) else kind


def close_shortcuts_(model: nn.Module) -> None:
    """Keep torch's transformer encoders from passing by their layers' forwards.

    In evaluation they may hand all weights to one fused function, and so never call the layers whose weights they are.

    Args:
        model: changed in place; computes what it did.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused function knows these two; "another one" is not fused
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
