"""A method's settings laid under those that a user gives."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from nipq.config import Settings
from nipq.errors import ConfigError
from nipq.train.methods import METHODS

WHOLE = ("weight_bits", "activation_bits")
"""Sections that mean something only as one: a range is not made of two."""


def with_method(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run's config, completed by those of the method that they name.

    Args:
        fields: Nested values; ``method`` is a word of :data:`~nipq.train.methods.METHODS`, ``"nipq"`` if left out.

    Returns:
        A new tree, in which what was given stands.

    Raises:
        ConfigError: If there is no such method; the message lists them.
    """
    word = fields.get("method", "nipq")
    if not isinstance(word, str) or word not in METHODS:
        close = get_close_matches(str(word), METHODS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}; found {word!r}{hint}")
    return merged(METHODS[word], fields)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields laid over others: what both have is taken from ``over``, sections are joined.

    Args:
        under: Nested plain values.
        over: Nested values; of :class:`~nipq.config.Settings` among them only the fields that were given count.

    Returns:
        A new tree.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}})
        {'a': {'b': 4, 'c': 2}, 'd': 3}
    """
    result = {**under, **over}
    for key in under.keys() & over.keys():
        value = over[key].model_dump(exclude_unset=True) if isinstance(over[key], Settings) else over[key]
        if key not in WHOLE and isinstance(under[key], Mapping) and isinstance(value, Mapping):
            result[key] = merged(under[key], value)
    return result
