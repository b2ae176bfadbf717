"""Fused kernels of the noise proxy and the true quantizer: the numbers of ``nipq.functional`` in one pass over memory.

:mod:`nipq.kernels.dispatch` chooses between the compiled kernels and plain operations. ``docs/internals/kernels.md``
has the times.
"""
