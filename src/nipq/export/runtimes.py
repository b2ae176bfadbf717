"""Runtimes: the interface of compiled models and their kernels, and faithful sessions of ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from nipq.errors import ConfigError, FileFormatError, require

if TYPE_CHECKING:
    import onnxruntime


class Kernel(NamedTuple):
    """Kernel by which a runtime computes one layer.

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
    """Base of models that a runtime compiled; called like the model.

    Args:
        runtime: its name.
        kernels: how each layer is computed, in the order of execution.
        warnings: differences from the deployed model, and layers that run slower than they could.
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


#: Set to 1, the runtime leaves QuantizeLinear and DequantizeLinear as they stand. Otherwise it puts float biases on a
#: grid of input step times weight step, computes weight-only products with int8 inputs, and refuses some 2-bit files.
FAITHFUL = "session.disable_quant_qdq"


def faithful_session(
    source: str | Path | bytes, *, threads: int | None = None, name: str | None = None, reuse_memory: bool = True
) -> onnxruntime.InferenceSession:
    """Open an ONNX file in ONNX Runtime on the CPU, without rewriting of its quantizers.

    The codes of every layer's input are then those of the deployed model, and a layer's output is within float rounding
    of it. Speed is that of float32.

    Args:
        source: path or contents of a file that ``nipq.export`` wrote, or of another ONNX file.
        threads: threads of one operator; as many as the machine has cores if not given.
        name: name of the file in messages; its path if not given.
        reuse_memory: whether tensors may share memory where the graph's sizes say that they are equally large.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        FileFormatError: if the runtime cannot read the file.
        MissingDependencyError: if ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="running ONNX files")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry(FAITHFUL, "1")
    options.enable_mem_reuse = reuse_memory
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session: onnxruntime.InferenceSession = runtime.InferenceSession(
            source if isinstance(source, bytes) else str(source), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the runtime's exceptions share no base class
        name = name or ("the contents" if isinstance(source, bytes) else str(source))
        raise FileFormatError(
            f"{name}: expected an ONNX file that ONNX Runtime can run, found: {error}. Export the model again."
        ) from error
    return session
