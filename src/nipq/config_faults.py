"""What is wrong with settings, in this library's words."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError

from nipq.errors import ConfigError


def config_error(kind: type[BaseModel], error: ValidationError, known: Sequence[str]) -> ConfigError:
    """Every fault on a line of its own: the field, what was expected, what was found.

    Args:
        kind: the settings that were to be built.
        error: what pydantic found.
        known: names of fields, for what may have been meant.
    """
    lines = []
    for fault in error.errors(include_url=False):
        place = ".".join([kind.__name__, *map(str, fault["loc"])])
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            close = get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "correct its name or remove it."
            lines.append(f"{place}: expected a known field, found this one; {hint}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: expected a value, found none; give one.")
        elif fault["type"] == "value_error":
            lines.append(f"{place}: {message}.")
        else:
            expected = message.removeprefix("Input should be ")
            lines.append(f"{place}: expected {expected}, found {fault['input']!r}; change it.")
    return ConfigError("\n".join(lines))
