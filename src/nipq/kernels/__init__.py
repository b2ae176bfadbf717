"""Fused twins of the maths in ``nipq.functional``: the same numbers in one pass over memory.

``proxy`` is the noise proxy and ``rounding`` the true quantizer; both choose between the compiled kernels (``cpu``) and
the plain operations by themselves. ``docs/speed.md`` says what they cost.
"""
