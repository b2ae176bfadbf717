"""Batches in every form that loaders and models use."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.prepare.batches import BatchReader, batches_of, evaluating, tensors_in, to_device


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


X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([0, 1])


def reader(**settings: Any) -> BatchReader:
    return BatchReader(nn.Linear(3, 2), purpose="calibrate_", **settings)


def test_inputs_of_a_float_model_are_found_where_loaders_put_them() -> None:
    for batch in (X, (X, Y), [X], ((X,), Y)):
        assert reader().inputs(batch) is X
    assert (
        reader().inputs({"input": X, "labels": Y, "image_id": Y}) == reader().inputs(({"input": X}, Y)) == {"input": X}
    )


@pytest.mark.parametrize("batch", ["text", 3, (), ("text", X), None, {"image": X}, {"input": "text"}], ids=str)
def test_batches_without_inputs_are_refused_with_what_they_are(batch: object) -> None:
    with pytest.raises(ConfigError, match=r"^calibrate_, batch 3: expected .*found .*Give inputs=, a function"):
        reader().inputs(batch, "calibrate_, batch 3")


def test_targets_stand_after_the_inputs() -> None:
    assert reader().targets((X, Y)) is Y
    assert reader().targets((X, Y, X)) == (Y, X)
    assert reader().targets({"input": X, "labels": Y}) is Y
    for batch in (X, (X,), {"input": X}):
        with pytest.raises(ConfigError, match=r"expected batches \(inputs, targets\), found one without"):
            reader().targets(batch)


def test_inputs_may_be_said_by_a_function() -> None:
    first = reader(inputs=lambda batch: batch["image"])
    assert first.inputs({"image": X, "label": Y}) is X
    assert first.targets({"image": X, "label": Y}) is Y
    last = reader(inputs=lambda batch: batch[1])  # the targets are those that it does not take
    assert last.inputs((Y, X)) is X
    assert last.targets((Y, X)) is Y
    made = reader(inputs=lambda batch: batch[0] / 2)
    assert torch.equal(made.inputs((X, Y)), X / 2)  # type: ignore[arg-type]
    assert made.targets((X, Y)) is Y
    inside = reader(inputs=lambda batch: batch[0])  # labels among the inputs, as of encoder-decoders
    assert inside.targets(({"x": X, "labels": Y}, Y)) is Y


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, r"calibrate_: expected inputs=, a function .* found int"),
        (lambda batch: batch["x"], r"batch 0: expected inputs= to take a batch, found that it fails on tuple .*Type"),
        (lambda _: None, r"batch 0: expected inputs= to return a tensor, .* found None"),
    ],
)  # fmt: skip
def test_functions_that_find_no_inputs_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reader(inputs=inputs).inputs((X, Y), "calibrate_, batch 0")


@pytest.mark.parametrize("loader", [None, 3, "text", X, {"input": X}], ids=str)
def test_what_is_no_loader_is_refused(loader: Any) -> None:
    with pytest.raises(ConfigError, match=r"calibrate_: expected a loader, an iterable of batches, found .*DataLoader"):
        batches_of(loader, "calibrate_")


def test_a_loader_without_batches_is_refused() -> None:
    spent = iter([X])
    assert len(list(reader().read(spent))) == 1
    for loader in ([], spent):
        with pytest.raises(ConfigError, match="calibrate_: expected at least one batch, found an empty loader, or one"):
            list(reader().read(loader))


def test_an_error_of_the_forward_tells_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"batch 7: expected inputs that the model takes.* float64 \[2, 3\]: .*dtype"):
        reader().call(nn.Linear(3, 2), X.double(), "calibrate_, batch 7")
    with pytest.raises(torch.OutOfMemoryError):
        reader().call(Full(), X)


class Full(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError


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
