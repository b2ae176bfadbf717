"""Layers with one bit-width between them: those of given names that read the same tensor, as query, key, value do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from nipq.config import Config
from nipq.errors import ConfigError
from nipq.nn.layers import LayerSpec
from nipq.prepare.plan import LayerPlan


def shared_groups(
    plans: Iterable[tuple[LayerSpec, LayerPlan]], shared: Mapping[str, tuple[str, ...]], config: Config
) -> list[tuple[str, ...]]:
    """Names of the layers of each group.

    Args:
        plans: layers that are to be quantized, and their settings.
        shared: names of the layers that read the same tensor, by the name of each.
        config: settings.

    Returns:
        Groups of two layers at least, in the order of execution.

    Raises:
        ConfigError: if a pattern leads to no group, or a group's layers have different bit-widths to choose from.
    """
    found = {spec.name: plan for spec, plan in plans if not spec.is_table and not spec.is_product}
    chosen = [name for name in found if any(fnmatchcase(name, pattern) for pattern in config.shared_bits)]
    groups = dict.fromkeys(tuple(other for other in shared.get(name, ()) if other in chosen) for name in chosen)
    kept = [group for group in groups if len(group) > 1]
    for pattern in config.shared_bits:
        if not any(fnmatchcase(name, pattern) for group in kept for name in group):
            raise ConfigError(
                f"shared_bits {pattern!r}: expected it to match a layer that reads the same tensor as another one of "
                f"these patterns, found none. Correct it; layers are {', '.join(list(found)[:5])}, ..."
            )
    for first, *others in kept:
        for other in others:
            ours, theirs = ((found[name].weight_bits, found[name].activation_bits) for name in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"{other}: expected the bit-widths of {first}, with which it is to share them, found others. "
                    "Let the rules give both the same weight_bits and activation_bits."
                )
    return kept
