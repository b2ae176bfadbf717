"""Quantization-aware training inside Lightning, transformers and Accelerate: a :class:`nipq.QATSession` in each."""
