"""Exceptions of nipq under one base class, diagnostics about a model, and helpers for their messages.

A message says three things: what was expected, what was found (with the full name of the module in the model where
there is one), and what to do about it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Literal


class NipqError(ValueError):
    """Base of every error that nipq raises on purpose."""


class NotQuantizableError(NipqError):
    """A layer, or a whole model, cannot be quantized as asked.

    Args:
        message: the whole of it.
        diagnostics: each refusal in it, by the module's name, where there are several.
    """

    def __init__(self, message: str, diagnostics: Iterable[Diagnostic] = ()) -> None:
        super().__init__(message)
        self.diagnostics = tuple(diagnostics)


class ConfigError(NipqError):
    """A setting is out of range, contradicts another one, or matches nothing."""


class OrderError(NipqError):
    """A call came too early or too late, such as a search on a model that was not prepared."""


class BudgetError(NipqError):
    """No allowed choice of bits meets the budget."""


class NonFiniteError(NipqError):
    """Data, a clipping range or a loss is NaN or infinite."""


class FileFormatError(NipqError):
    """A file is not what its name or header promises."""


class UserCodeError(NipqError):
    """Code that a config or a command names, and not nipq's own, failed."""


class DistributedError(NipqError):
    """Ranks do not hold the same model, or one of them is gone."""


class MissingDependencyError(NipqError, ImportError):
    """An optional dependency is not installed."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Args:
        module: dotted name of the module, such as ``"onnx"``.
        extra: the extra of this package that installs it.
        purpose: what it is needed for, in words that complete "... is needed for".

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: if the import fails.

    Example:
        >>> require("math", extra="onnx", purpose="a square root").sqrt(4.0)
        2.0
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"expected the package {module!r}, which is needed for {purpose}; found: {error}. "
            f'Install it with: pip install "nipq[{extra}]"'
        ) from error


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "correct its name.") -> str:
    """Advice about a word that is not among the known ones.

    Args:
        word: the word that was found.
        known: the words that were expected.
        otherwise: advice where none of them is close.

    Example:
        >>> did_you_mean("granularty", ["grid", "granularity"])
        "did you mean 'granularity'?"
    """
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message, or the name of its class if it has no message.

    Example:
        >>> first_line(OSError("disk full\nand more")), first_line(TimeoutError())
        ('disk full', 'TimeoutError')
    """
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Diagnostic:
    """A fact about a model that ``prepare_`` would refuse, leave float, or do in a way worth knowing.

    Attributes:
        name: full name of the module.
        severity: ``"error"`` (refused), ``"float"`` (stays float) or ``"note"``.
        reason: what was found.
        remedy: what to do about it, empty when there is nothing to do.
    """

    name: str
    severity: Literal["error", "float", "note"]
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line: severity, name, reason, remedy."""
        return f"{self.severity}: {self.name or 'the model'}: {self.reason}.{' ' + self.remedy if self.remedy else ''}"
