"""Deployed models: convert a trained model, save and load it, and export it (ONNX, QONNX, arrays, torch.export)."""

from __future__ import annotations

from nipq.export.api import ExportedLayer, ExportedProduct, ExportReport, Format, export

__all__ = ["ExportReport", "ExportedLayer", "ExportedProduct", "Format", "export"]
