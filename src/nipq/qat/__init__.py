"""Quantization-aware training: the session, search for bit-widths, calibration, optimizer groups, batch norms, EMA."""
