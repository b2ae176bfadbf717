"""A deployed model as a file for other programs: ONNX, QONNX, plain arrays, a ``torch.export`` program."""

from __future__ import annotations

from nipq.export.api import Format, export
from nipq.export.report import ExportedLayer, ExportedProduct, ExportReport

__all__ = ["ExportReport", "ExportedLayer", "ExportedProduct", "Format", "export"]
