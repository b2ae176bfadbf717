"""Collectives over ranks: sums, samples, decisions of rank 0, and errors that reach every rank; FSDP and batch norms.

Everything here works on torch's default process group, whoever made it (``torchrun``, ``accelerate``, Lightning), and
does nothing, at no cost, when there is none. All functions are collective where ranks are many: every rank has to call
them in the same order.
"""

from __future__ import annotations

from nipq.distributed.collectives import (
    SHARDING_WRAPPERS,
    WRAPPERS,
    all_or_none,
    all_present,
    barrier,
    broadcast_,
    check_same_,
    from_rank_zero,
    gather_objects,
    gather_samples,
    inner,
    is_distributed,
    is_sharded,
    layers_of_wrapping,
    like,
    part,
    rank,
    rank_seed,
    reduce_mean_,
    reduce_min_,
    reduce_sum_,
    whole,
    world_size,
    wrapped_in,
)

__all__ = [
    "SHARDING_WRAPPERS",
    "WRAPPERS",
    "all_or_none",
    "all_present",
    "barrier",
    "broadcast_",
    "check_same_",
    "from_rank_zero",
    "gather_objects",
    "gather_samples",
    "inner",
    "is_distributed",
    "is_sharded",
    "layers_of_wrapping",
    "like",
    "part",
    "rank",
    "rank_seed",
    "reduce_mean_",
    "reduce_min_",
    "reduce_sum_",
    "whole",
    "world_size",
    "wrapped_in",
]
