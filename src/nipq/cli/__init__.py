"""The ``nipq`` command."""

from __future__ import annotations

from nipq.cli.app import app, main

__all__ = ["app", "main"]
