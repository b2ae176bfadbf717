"""Verification that a deployed model is the trained one, at the levels E0 (numbers) to E3 (bit-exact outputs)."""

from __future__ import annotations

from nipq.verify.api import Metric, verify
from nipq.verify.result import Check, VerifyResult

__all__ = ["Check", "Metric", "VerifyResult", "verify"]
