"""The rival methods, each a word for a set of fields of a run's config."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {"nipq": {}}
