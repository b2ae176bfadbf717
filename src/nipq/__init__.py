"""Mixed-precision quantization with the noise proxy (NIPQ): bits, boundaries and weights learned together."""

from __future__ import annotations

__version__ = "0.1.0"
