"""Deployed models on runtimes with integer kernels, each behind an extra of its own."""
