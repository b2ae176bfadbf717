"""Without torch.distributed there is nothing to test here."""

from __future__ import annotations

import torch.distributed as dist

if not dist.is_available():
    collect_ignore_glob = ["test_*.py"]
