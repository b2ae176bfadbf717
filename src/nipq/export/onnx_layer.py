"""What the ONNX forms of a deployed layer share: its numbers as buffers, and its own forward between quantizers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from nipq.errors import NotQuantizableError
from nipq.export.modules import Deployed, take_input
from nipq.export.onnx_input import OnnxInput
from nipq.export.portable import PortableLayer, plain_kind
from nipq.nn.kinds import along_channels, channel_dim, is_plain, is_table


class OnnxLayer(OnnxInput):
    """One deployed layer, about to be exported; it can be traced, not run.

    Args:
        layer: the deployed layer.
        numbers: its portable numbers.
        name: its full name.
    """

    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Deployed, numbers: PortableLayer, name: str) -> None:
        super().__init__(name, numbers.input)
        if is_table(layer.layer) and not is_plain(layer.layer):
            raise NotQuantizableError(
                f"{name}: expected an embedding that looks its table up and no more, found {layer.kind} with a forward "
                f"of its own, which ONNX files do not hold. Use Rule({name!r}, quantize=False) when preparing."
            )
        self.shell = layer.layer
        self._buffers["weight"] = numbers.weight  # past register_buffer, as the attribute is a float view
        self.register_buffer("weight_scale", numbers.weight_scale)
        self.register_buffer("bias", numbers.bias)
        #: Whether the weight's scale can only be applied behind the sums.
        self.scale_after = False
        # A subclass may do anything with its bias; the deployed layer adds it after the subclass's forward.
        self.bias_inside = plain_kind(self.shell) is not None or numbers.input is None

    @property
    def integers(self) -> Tensor:
        """What the file holds under the name ``weight``."""
        integers = self._buffers["weight"]
        assert integers is not None
        return integers

    @property
    def weight(self) -> Tensor:
        """The weight as floats, for models that look at its type; see ``nipq.export.modules``."""
        return self.integers.to(torch.float32) * along_channels(self.weight_scale, self.shell, self.integers)

    def trained(self) -> set[str]:
        """The numbers of the layer, and those of its input."""
        return {"weight", "weight_scale", "bias"} | super().trained()

    @abstractmethod
    def dequantized_weight(self) -> Tensor:
        """The weight on its levels, as operators of the format."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401  (the trained layer's own arguments)
        """The layer as operators.

        Args:
            *args: the input and what else the trained layer takes.
            **kwargs: the same by name.
        """
        args, kwargs, x = take_input(args, kwargs)
        x = self.on_levels(x)
        parts = {"weight": self.marked(self.dequantized_weight(), "weight")}
        bias = None if self.bias is None else self.marked(self.bias, "bias")
        inside = self.bias_inside and not self.scale_after
        if inside and bias is not None:
            parts["bias"] = bias
        y: Tensor = torch.func.functional_call(self.shell, parts, (x, *args), kwargs)
        if self.scale_after:
            y = y * self._along_channels(self.marked(self.weight_scale, "weight_scale"))
        if not inside and bias is not None:
            y = y + self._along_channels(bias)
        return self.marked(y, "output")

    def _along_channels(self, values: Tensor) -> Tensor:
        """Shaped to broadcast with the output; no reshape, whose target tools take for a batch and change."""
        for _ in range(-channel_dim(self.shell) - 1):
            values = values.unsqueeze(-1)
        return values
