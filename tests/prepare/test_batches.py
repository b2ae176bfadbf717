"""Batches in every form that loaders and models use."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.prepare.batches import evaluating, inputs_of, tensors_in, to_device


class Pair(NamedTuple):
    """A named tuple of tensors."""

    left: Tensor
    right: Tensor


class Cache:
    """An object that models take and nipq knows nothing of."""


META = torch.device("meta")


def test_tensors_are_moved_however_deep_and_unknown_objects_pass_through() -> None:
    x, cache = torch.zeros(2), Cache()
    given = {"x": x, "states": [x, (x, None)], "pair": Pair(x, x), "cache": cache, "flag": True}
    found = to_device(given, META)
    assert all(tensor.device == META for tensor in tensors_in(found))
    assert len(list(tensors_in(found))) == len(list(tensors_in(given))) == 5
    assert found["cache"] is cache
    assert (found["flag"], found["states"][1][1]) == (True, None)
    assert isinstance(found["pair"], Pair)
    assert to_device(cache, META) is cache
    assert to_device(x, META).device == META


def test_inputs_are_found_where_loaders_put_them() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert inputs_of(x) is inputs_of((x, y)) is inputs_of([x]) is x
    assert inputs_of({"x": x, "labels": y}) == inputs_of(({"x": x}, y)) == {"x": x}
    with pytest.raises(ConfigError, match="expected batches of tensors, found int"):
        inputs_of(3)


def test_every_module_has_its_own_mode_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    seen = []

    def fail(module: nn.Module, _args: object) -> None:
        seen.append(module.training)
        raise ZeroDivisionError

    model[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        model(torch.zeros(1))
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, False]
