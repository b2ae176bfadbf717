"""Where the inputs stand in batches of every form, and that a model remembers how it is called."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nipq.errors import ConfigError
from nipq.prepare.batches import BatchReader, call_model
from nipq.prepare.convert import convert
from nipq.prepare.input_form import InputForm, form_of, guessed_inputs, known_form
from nipq.prepare.layer_table import layer_table
from nipq.prepare.prepare import prepare_, restore_
from nipq.qat.calibrate import calibrate_

A, B, Y = torch.randn(5, 4), torch.randn(5, 3), torch.arange(5) % 2


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor, scale: float | None = None) -> Tensor:
        return (self.a(left) + self.b(right)) * (1.0 if scale is None else scale)


class Pair(NamedTuple):
    """As loaders give them; in another order than the forward's."""

    right: Tensor
    left: Tensor
    y: Tensor


@dataclass
class Record:
    """A batch with names."""

    left: Tensor
    right: Tensor
    labels: Tensor


class Container:
    """Works like a mapping and is none, as tensordicts."""

    def __init__(self, **items: Any) -> None:
        self.items = items

    def keys(self) -> Any:
        return self.items.keys()

    def __getitem__(self, key: str) -> Any:
        return self.items[key]


NAMED: list[Any] = [
    {"left": A, "right": B, "labels": Y, "image_id": ["a"] * 5},
    UserDict(left=A, right=B, labels=Y),
    Record(A, B, Y),
    Container(left=A, right=B, labels=Y),
    ({"left": A, "right": B}, Y),
    [{"right": B, "left": A}, Y],
]
POSITIONS: list[Any] = [
    (A, B, Y),
    [A, B, Y],
    ((A, B), Y),
    [[A, B], Y],
    (A, B),
    ((A, B),),
    Pair(B, A, Y),
    Record(A, B, Y),
    {"left": A, "right": B, "labels": Y},
]


@pytest.mark.parametrize("batch", POSITIONS, ids=lambda batch: type(batch).__name__)
def test_two_positional_inputs(batch: Any) -> None:
    found = form_of((A[:1], B[:1]), Two()).inputs(batch)
    assert isinstance(found, tuple)
    assert found[0] is A
    assert found[1] is B


@pytest.mark.parametrize("batch", [*POSITIONS[:4], *POSITIONS[6:]], ids=lambda batch: type(batch).__name__)
def test_targets_of_two_positional_inputs(batch: Any) -> None:
    assert form_of((A[:1], B[:1]), Two()).targets(batch) is Y


@pytest.mark.parametrize("batch", NAMED, ids=lambda batch: type(batch).__name__)
def test_keywords_are_those_of_the_example(batch: Any) -> None:
    form = form_of({"left": A[:1], "right": B[:1]}, Two())
    found = form.inputs(batch)
    assert list(found) == ["left", "right"]
    assert found["left"] is A
    assert form.targets(batch) is Y


def test_labels_stay_where_the_example_had_them() -> None:
    batch = {"input_ids": Y, "labels": Y, "image_id": [1], "extra": A}
    for names in (["input_ids"], ["input_ids", "labels"], ["labels", "input_ids", "extra"]):
        form = form_of({name: batch[name] for name in names})
        assert list(form.inputs(batch)) == names
        assert form.targets(batch) is Y


def test_one_input_under_one_name_needs_no_mapping() -> None:
    form = form_of({"pixels": A[:1]})
    for batch in (A, (A, Y), [A]):
        assert form.inputs(batch) == {"pixels": A}
    assert form.targets((A, Y)) is Y


def test_a_mapping_may_name_the_positions_of_the_forward_but_not_more() -> None:
    form = form_of((A[:1], B[:1]), Two())
    found = form.inputs({"right": B, "left": A, "image_id": 3})
    assert found[0] is A
    with pytest.raises(ConfigError, match=r"of which the forward takes 'scale', too\. Give inputs="):
        form.inputs({"right": B, "left": A, "scale": A})


def test_constants_of_the_example_are_those_of_every_batch() -> None:
    form = form_of((A[:1], B[:1], 3.0), Two())
    for batch in ((A, B), (A, B, Y), ((A, B), Y), (A, B, 3.0)):
        assert form.inputs(batch) == (A, B, 3.0)
    between = form_of((A[:1], None, B[:1]))
    assert between.inputs((A, B, Y)) == between.inputs((A, None, B, Y)) == (A, None, B)
    assert between.targets((A, None, B, Y)) is Y
    named = form_of({"x": A[:1], "mask": None, "return_dict": False})
    assert named.inputs({"x": A}) == {"x": A, "mask": None, "return_dict": False}
    assert named.inputs({"x": A, "mask": B})["mask"] is B  # None was said of the example alone


def test_inputs_that_are_lists_or_mappings() -> None:
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    form = form_of((images,))
    for batch in ((images, [{"boxes": A}]), images, (images,)):
        assert form.inputs(batch) == (images,)
    whole = form_of(({"x": A},))
    for given in ({"x": A, "y": B}, ({"x": A, "y": B}, Y)):
        assert whole.inputs(given) == ({"x": A, "y": B},)


WRONG: list[tuple[Any, Any, str]] = [
    ((A, B), (A,), r"expected 2 inputs, as in the example inputs, found tuple \(float32 \[5, 4\]\)\. Give inputs="),
    ((A, B), A, r"expected 2 inputs, .*found float32 \[5, 4\]"),
    ((A, B), ((A, B, A), Y), r"expected 2 inputs, .*found tuple \(tuple \(3 items\), int64"),
    ((A, B), {"left": A}, r"expected 2 inputs, .*found dict of 'left', without 'right'"),
    (A, ((A, B), Y), r"expected one input, .*found tuple \(tuple \(2 items\), int64"),
    (A, {"a": A, "b": B}, r"expected one input, .*found dict of 'a', 'b'"),
    (A, [], r"expected one input, .*found an empty list"),
    ({"a": A, "b": B}, {"a": A, "labels": Y}, r"keyword inputs a, b, .*found dict of 'a', 'labels', without 'b'"),
    ({"a": A, "b": B}, (A, B, Y), r"keyword inputs a, b, as in the example inputs, found tuple"),
    ({"a": A, "b": B}, A, r"keyword inputs a, b, as in the example inputs, found float32"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "batch", "message"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_refused_with_what_was_expected_and_found(example: Any, batch: Any, message: str) -> None:
    model = Two() if isinstance(example, tuple) else None
    with pytest.raises(ConfigError, match=message):
        form_of(example, model).inputs(batch)


# ---------------------------------------------------------------------- samples


def test_what_belongs_to_all_samples_stays_whole() -> None:
    mask = torch.ones(1, 1, 8, 8)
    for size in (1, 2, 8, 10):
        x, prototypes = torch.arange(8.0 * size).reshape(size, 8), torch.ones(10, 8)
        form = form_of({"x": x[:1], "mask": mask, "prototypes": prototypes})
        given = {"x": x, "mask": mask, "prototypes": prototypes}  # ten of them, as many as samples in the last case
        assert form.samples(given) == size
        found = form.cut(given, size - 1, size)
        assert torch.equal(found["x"], x[size - 1 :])  # type: ignore[call-overload]
        assert found["mask"].shape == mask.shape  # type: ignore[call-overload]
        assert found["prototypes"] is prototypes  # type: ignore[call-overload]


def test_samples_are_cut_in_every_form() -> None:
    assert torch.equal(form_of(A).cut(A, 1, 3), A[1:3])  # type: ignore[arg-type]
    left, right = form_of((A, B)).cut((A, B), 1, 3)
    assert torch.equal(left, A[1:3])
    assert torch.equal(right, B[1:3])
    (inner,) = form_of(({"x": A},)).cut(({"x": A},), 1, 3)
    assert torch.equal(inner["x"], A[1:3])
    with pytest.raises(ConfigError, match="expected tensors whose first axis is that of the samples"):
        form_of((torch.tensor(3.0),)).samples((torch.tensor(3.0),))


@pytest.mark.parametrize(
    ("example", "given", "message"),
    [
        (A, Y, "the input: expected floating-point numbers, as in the example inputs, found torch.int64. Cast it"),
        ({"ids": Y}, {"ids": A}, "input 'ids': expected whole numbers, as in the example inputs, found torch.float32"),
        (A, A[0], r"expected a batch of 2 axes, as in the example inputs, found shape \[4\]\. Put a DataLoader"),
        (A, A[:0], r"expected a sample at least, found none in float32 \[0, 4\]"),
    ],
)
def test_inputs_of_another_type_or_without_samples_are_refused(example: Any, given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        form_of(example).check(given)
    form_of(example).check(example)


# ---------------------------------------------------------------------- a model remembers


def prepared() -> nn.Module:
    return prepare_(Two(), (A[:1], B[:1]))


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def test_the_form_is_copied_pickled_and_found_in_wrappers_and_is_no_state() -> None:
    model = prepared()
    form = known_form(model)
    assert isinstance(form, InputForm)
    assert [one.name for one in form.arguments] == ["left", "right"]
    assert not any("form" in name for name in model.state_dict())
    for other in (copy.deepcopy(model), Wrapper(model), prepared()):
        assert known_form(other) == form
    assert known_form(model.a) is None  # a part is called in another way
    assert known_form(nn.ModuleList([model, prepare_(nn.Linear(4, 2), A)])) is None
    again = prepared()
    again.load_state_dict(model.state_dict())
    assert known_form(again) == form
    assert known_form(restore_(model)) is None


def test_the_deployed_model_knows_it_too() -> None:
    model = calibrate_(prepared(), [(A, B, Y)])
    for row in layer_table(model):
        row.weight.freeze_bits_(4)
        row.input.freeze_bits_(4)
    deployed = convert(model)
    assert known_form(deployed) == known_form(model)
    assert known_form(pickle.loads(pickle.dumps(deployed))) == known_form(model)
    expected = model.eval()(A, B)
    torch.testing.assert_close(call_model(deployed, BatchReader(deployed).inputs(((A, B), Y))), expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_calibration_is_the_same_whatever_stands_beside_the_inputs(wrapped: bool) -> None:
    torch.manual_seed(0)
    first = calibrate_(prepared(), [(A, B)])
    for batch in POSITIONS:
        other = prepared()
        other.load_state_dict(first.state_dict())
        calibrate_(Wrapper(other) if wrapped else other, [batch])
        assert all(
            torch.equal(ours.input.alpha, theirs.input.alpha)
            for ours, theirs in zip(layer_table(first), layer_table(other), strict=True)
        )


# ---------------------------------------------------------------------- models that were not prepared


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Takes anything."""


def test_of_a_float_model_the_forward_says_how_many_inputs_there_are() -> None:
    for batch in ((A, B, Y), ((A, B), Y), [A, B], ((A, B),)):
        found = guessed_inputs(batch, Two())
        assert found[0] is A
        assert found[1] is B
    for named in ({"left": A, "right": B, "labels": Y, "id": Y}, UserDict(left=A, right=B), Record(A, B, Y)):
        found = guessed_inputs(named, Two())
        assert isinstance(found, Mapping)
        assert list(found) == ["left", "right"]
    assert guessed_inputs((A, Y), nn.Linear(4, 2)) is A
    assert guessed_inputs(((A,), Y), nn.Linear(4, 2)) == (A,)
    assert guessed_inputs({"x": A, "label": Y}, Anything()) == {"x": A}
    images = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    assert guessed_inputs((images, [Y, Y]), nn.Flatten()) == (images,)
    for batch in ((A,), {"image": A}, (), 3):
        with pytest.raises(ConfigError, match="expected batches with tensors that the model takes, found"):
            guessed_inputs(batch, Two())
