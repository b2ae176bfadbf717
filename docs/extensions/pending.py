"""MkDocs hook: leave out names that the pages describe and the package does not have yet.

They are listed in ``mkdocs.yml`` under ``extra: pending``. When the list is empty, this file and its line there can go.
"""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:  # noqa: ANN401  (MkDocs' signature)
    """Take entries and links of pending names out of a page.

    Args:
        markdown: source of the page.
        config: settings of the site.

    Returns:
        The page without them.
    """
    for name in config["extra"].get("pending") or []:
        entry = rf"(?m)^::: {re.escape(name)}\n(?:[ ]+.*\n)*"
        markdown = re.sub(entry, f"`{name}`: not in this version yet.\n", markdown)
        markdown = re.sub(rf"\[(`[^`]+`)\]\[{re.escape(name)}\]", r"\1", markdown)
    return markdown
