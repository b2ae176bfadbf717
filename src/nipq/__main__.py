"""``python -m nipq``."""

from __future__ import annotations

from nipq.cli import main

if __name__ == "__main__":
    main()
