"""Griffe extension: show the docstrings of nipq as Markdown.

Roles with the full path of an object become links to its entry, other roles become code; a double colon before an
example becomes a single one; ``Example:`` becomes the section that griffe knows; and constants are documented by the
comment above them that starts with ``#:``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")


class MarkdownDocstrings(griffe.Extension):
    """Translate each docstring when its object is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401  (griffe's signature)
        """Rewrite the docstring of one object.

        Args:
            obj: the module, class, function or attribute that was loaded.
        """
        if obj.docstring is None and obj.is_attribute and obj.lineno is not None:
            comment = comment_above(Path(str(obj.filepath)), obj.lineno)
            if comment:
                obj.docstring = griffe.Docstring(comment, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Docstring text with roles and literal blocks written as Markdown.

    Args:
        text: a docstring.
    """
    text = ROLE.sub(_link, text)
    text = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", text)
    return re.sub(r"(?m)^ *::\n", "", re.sub(r"(\S)::\n", r"\1:\n", text))


def comment_above(path: Path, line: int) -> str:
    """The ``#:`` comment right above a line, without its marks.

    Args:
        path: file of the object.
        line: its first line, from 1.
    """
    found: list[str] = []
    for text in reversed(_lines(path)[: line - 1]):
        if not text.strip().startswith("#:"):
            break
        found.insert(0, text.strip()[2:].strip())
    return " ".join(found)


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _link(match: re.Match[str]) -> str:
    short, path = match.groups()
    shown = path.rpartition(".")[2] if short else path
    if not path.startswith("nipq."):
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
