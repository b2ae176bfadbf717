"""Guests in the loops of Lightning, transformers and Accelerate: glue over :class:`nipq.Course`, one file for each."""
