"""What every runtime gives: a module that is called like the model, and which kernel runs which layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from nipq.errors import ConfigError


class Kernel(NamedTuple):
    """How a runtime computes one layer.

    Attributes:
        name: full name of the layer.
        what: the runtime's own words, such as ``"u8 brgconv_avx512_I8"``.
        integer: whether it sums whole codes.
        expected: whether it should: both bit-widths are at most 8, and nothing that is known stands in the way.
    """

    name: str
    what: str
    integer: bool
    expected: bool


class CompiledModel(nn.Module, ABC):
    """A model in the hands of a runtime.

    Args:
        runtime: its name.
        kernels: how each layer is computed, in the order of execution.
        warnings: what differs from the deployed model, or runs slower than it could.
    """

    def __init__(self, runtime: str, kernels: Iterable[Kernel], warnings: Iterable[str]) -> None:
        super().__init__()
        self.runtime, self.kernels, self.warnings = runtime, tuple(kernels), tuple(warnings)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:  # noqa: ANN401  (the model's own arguments)
        """The model's output.

        Args:
            *args: the model's arguments.
            **kwargs: the same by name.
        """

    def float_layers(self) -> tuple[str, ...]:
        """Layers that should run in integers and do not."""
        return tuple(kernel.name for kernel in self.kernels if kernel.expected and not kernel.integer)

    def check_integer(self) -> None:
        """Refuse a model with layers that should run in integers and do not.

        Raises:
            ConfigError: naming them.
        """
        if names := self.float_layers():
            kernels = {kernel.name: kernel.what for kernel in self.kernels}
            raise ConfigError(
                f"{self.runtime}: expected integer kernels for all layers of at most 8 bits, found floats for "
                f"{', '.join(f'{name} ({kernels[name]})' for name in names)}. Export without packing, or pass "
                "strict=False to run it all the same."
            )
