"""ONNX Runtime sessions that compute what the file says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nipq.errors import FileFormatError, require

if TYPE_CHECKING:
    import onnxruntime

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
        source: what ``nipq.export`` wrote, or another ONNX file: its path, or its contents.
        threads: threads of one operator; as many as the machine has cores if not given.
        name: what to call the file in messages; its path if not given.
        reuse_memory: whether tensors may share memory where the graph's sizes say that they are equally large.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        FileFormatError: if the runtime cannot read the file.
        MissingDependencyError: if ONNX Runtime is not installed.
    """
    runtime = require("onnxruntime", extra="onnx", purpose="running ONNX files")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what is an error is raised
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
