"""Proof that the deployed model is the trained one, on the ladder E0 to E3."""

from __future__ import annotations

from nipq.verify.api import Metric, verify
from nipq.verify.result import Rung, VerifyResult

__all__ = ["Metric", "Rung", "VerifyResult", "verify"]
