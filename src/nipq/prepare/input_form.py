"""Form of a model's inputs: how a model is called, and where the inputs and the targets stand in a loader's batch.

``prepare_`` remembers the form of its example inputs with the model. By it every function that reads a loader finds
the inputs in a batch, whatever stands beside them:

=======================  ======================================================================================
example inputs           batches
=======================  ======================================================================================
a tensor                 ``x``, ``(x, y)``, ``(x,)``
several, ``(x1, x2)``    ``(x1, x2)``, ``(x1, x2, y)``, ``((x1, x2), y)``
keywords, ``{"a": a}``   a mapping, dataclass or named tuple that has these keys (others, such as ``labels``, are
                         left out unless the example had them), alone or first in a tuple
=======================  ======================================================================================

The form is an attribute of the module that was prepared: it is copied and pickled with the model, found inside
wrappers, and not in state dicts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nipq.errors import ConfigError

#: Arguments that a model is called with: one tensor, several positional ones, or keywords.
ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]

#: Names of targets in batches that are mappings.
LABELS = ("labels", "label", "targets", "target")

#: Remedy where the inputs are not found in a batch.
REMEDY = "Give inputs=, a function from a batch to what the model is called with."

_ATTRIBUTE = "_nipq_input_form"
_CONSTANTS = (bool, int, float, str, torch.dtype, type(None))

Kind = Literal["tensor", "mapping", "sequence", "object", "constant"]


@dataclass(frozen=True)
class Argument:
    """One argument of a model's forward.

    Attributes:
        name: the keyword; of a positional argument the forward's name of it, empty if it has none.
        kind: a tensor, a mapping, a list or tuple, another object, or a constant such as None or True.
        value: of a constant; every batch is called with it.
        floating: whether a tensor holds floating-point numbers.
        axes: number of axes of a tensor.
        batched: whether the first axis of a tensor is that of the samples.
    """

    name: str
    kind: Kind
    value: Any = None
    floating: bool = False
    axes: int = 0
    batched: bool = False

    def fits(self, value: object) -> bool:
        """Return whether a value is of the argument's kind."""
        if self.kind == "tensor":
            return isinstance(value, Tensor)
        if self.kind == "mapping":
            return isinstance(value, Mapping)
        if self.kind == "sequence":
            return isinstance(value, (tuple, list))
        return self.kind == "object" or not isinstance(value, Tensor)


@dataclass(frozen=True)
class InputForm:
    """Form of a model's inputs.

    Attributes:
        arguments: in the order of the call.
        keywords: whether they are given by name.
        known: names of all arguments that the forward has.
    """

    arguments: tuple[Argument, ...]
    keywords: bool
    known: tuple[str, ...] = ()

    @property
    def varying(self) -> tuple[Argument, ...]:
        """The arguments that come from the batch; constants do not."""
        return tuple(argument for argument in self.arguments if argument.kind != "constant")

    def __str__(self) -> str:
        """The inputs in words."""
        count = len(self.varying)
        if self.keywords:
            return f"the keyword input{'s' * (count != 1)} {', '.join(one.name for one in self.varying)}"
        return "one input" if count == 1 else f"{count} inputs"

    # ------------------------------------------------------------------ the inputs in a batch

    def inputs(self, batch: Any) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
        """The model's inputs in a batch.

        Args:
            batch: what a loader yields.

        Returns:
            A tensor, a tuple of positional inputs, or a dict of keyword inputs.

        Raises:
            ConfigError: if they are not found there, saying what was.
        """
        values, _ = self._split(batch)
        if self.keywords:
            return {one.name: value for one, value in zip(self.arguments, values, strict=True)}
        return values[0] if len(values) == 1 and isinstance(values[0], Tensor) else tuple(values)

    def targets(self, batch: Any) -> Any:  # noqa: ANN401  (whatever a loader yields)
        """The targets of a batch: the items after its inputs, or one under a name of :data:`LABELS`.

        Args:
            batch: what a loader yields.

        Returns:
            The one item after the inputs, or a tuple if there are several.

        Raises:
            ConfigError: if there is none.
        """
        return the_rest(self._split(batch)[1], batch)

    def _split(self, batch: Any) -> tuple[list[Any], Any]:  # noqa: ANN401
        """Values of the arguments, and the rest: a list of items, or a mapping."""
        named, items = as_mapping(batch), as_items(batch)
        if named is not None and not self._is_one("mapping", "object"):
            missing = [one.name for one in self.varying if one.name not in named]
            if not missing:
                return self._split_names(named, is_record=items is not None)
            if items is None:
                lacking = f", without {', '.join(map(repr, missing))}" if all(missing) else ""
                raise self._not_found(batch, lacking)
        return self._split_items(batch, items)

    def _split_names(self, named: Mapping[str, Any], *, is_record: bool) -> tuple[list[Any], Any]:
        names = {one.name for one in self.arguments}
        more = [key for key in named if key in self.known and key not in names and key not in LABELS]
        if more and not self.keywords:
            raise self._not_found(named, f", of which the forward takes {', '.join(map(repr, more))}, too")
        values = [named.get(one.name, one.value) for one in self.arguments]
        if is_record and not any(key in named for key in LABELS):  # of a dataclass or named tuple
            return values, [value for key, value in named.items() if key not in names]
        return values, named

    def _split_items(self, batch: object, items: list[Any] | None) -> tuple[list[Any], Any]:
        varying, one = self.varying, self._is_one
        if items is None:
            if len(varying) == 1 and varying[0].fits(batch) and (one("tensor", "mapping", "object") or self.keywords):
                return self._filled([batch]), batch if isinstance(batch, Mapping) else []
            raise self._not_found(batch)
        count, every, first = len(varying), len(self.arguments), next(iter(items), None)
        if one("sequence") and items and all(isinstance(item, Tensor) for item in items):
            return self._filled([batch]), []  # samples in a list, without targets
        if count == 1 or not self.keywords:
            if self._all_fit(varying, items[:count]):
                return self._filled(items[:count]), items[count:]
            if self._all_fit(self.arguments, items[:every]):
                return items[:every], items[every:]
            inner = as_items(first)
            if inner is not None and self._all_fit(varying, inner):
                return self._filled(inner), items[1:]
        if items and as_mapping(first) is not None:
            return self._split(first)[0], items[1:]
        raise self._not_found(batch)

    def _filled(self, values: Sequence[Any]) -> list[Any]:
        """Values of the varying arguments with the constants among them."""
        given = iter(values)
        return [one.value if one.kind == "constant" else next(given) for one in self.arguments]

    def _is_one(self, *kinds: Kind) -> bool:
        """Return whether there is one positional input, of one of these kinds."""
        return not self.keywords and len(self.varying) == 1 and self.varying[0].kind in kinds

    @staticmethod
    def _all_fit(arguments: Sequence[Argument], values: Sequence[Any]) -> bool:
        return len(arguments) == len(values) and all(a.fits(v) for a, v in zip(arguments, values, strict=True))

    def _not_found(self, batch: object, detail: str = "") -> ConfigError:
        return ConfigError(f"expected {self}, as in the example inputs, found {described(batch)}{detail}. {REMEDY}")

    # ------------------------------------------------------------------ samples

    def pairs(self, inputs: ExampleInputs) -> Iterator[tuple[Argument | None, Any]]:
        """Each value among inputs with its argument; None where inputs have another form than this."""
        values = values_of(inputs)
        known: Sequence[Argument | None] = self.arguments
        if isinstance(inputs, Mapping):
            by_name = {one.name: one for one in self.arguments}
            known = [by_name.get(name) for name in inputs]
        if len(known) != len(values):
            known = [None] * len(values)
        yield from zip(known, values, strict=True)

    def is_called_so(self, inputs: ExampleInputs) -> bool:
        """Return whether inputs have this form: so many positions, or these keywords."""
        if isinstance(inputs, Mapping) != self.keywords:
            return False
        if isinstance(inputs, Mapping):
            return {one.name for one in self.varying} <= set(inputs)
        return self._all_fit(self.arguments, values_of(inputs))

    def samples(self, inputs: ExampleInputs) -> int:
        """Number of samples: length of the first tensor that has one entry for each.

        Raises:
            ConfigError: if there is no such tensor.
        """
        found = list(self.pairs(inputs))
        batched = [value for known, value in found if known is not None and known.batched]
        tensor = next((one for one in tensors_in([*batched, *(value for _, value in found)]) if one.ndim), None)
        if tensor is None:
            raise ConfigError(
                f"expected tensors whose first axis is that of the samples, found {described(inputs)}. {REMEDY}"
            )
        return len(tensor)

    def cut(self, inputs: ExampleInputs, start: int, stop: int) -> ExampleInputs:
        """Some samples of inputs; tensors that belong to all samples, such as an attention mask, stay whole.

        Whether a tensor has one entry for each sample was seen in the example: its first axis was as long as the batch.

        Args:
            inputs: what the model is called with.
            start: the first sample.
            stop: the one after the last.

        Returns:
            Inputs of the same form.
        """
        count = self.samples(inputs)
        values = [
            value
            if known is not None and known.kind == "tensor" and not known.batched
            else cut(value, start, stop, count)
            for known, value in self.pairs(inputs)
        ]
        if isinstance(inputs, Tensor):
            return values[0]  # type: ignore[no-any-return]  # a tensor
        return dict(zip(inputs, values, strict=True)) if isinstance(inputs, Mapping) else tuple(values)

    def check(self, inputs: ExampleInputs) -> None:
        """Refuse inputs of another type than the example's, without a batch axis, or without a sample.

        Args:
            inputs: what the model is to be called with.

        Raises:
            ConfigError: saying what was expected and found.
        """
        for known, value in self.pairs(inputs):
            if known is None or known.kind != "tensor" or not isinstance(value, Tensor):
                continue
            where = f"input {known.name!r}" if known.name else "the input"
            if value.is_floating_point() != known.floating:
                expected, remedy = ("whole numbers", "Do not cast it.") if not known.floating else (
                    "floating-point numbers", "Cast it, such as by x.float() / 255 for images of bytes."
                )  # fmt: skip
                raise ConfigError(
                    f"{where}: expected {expected}, as in the example inputs, found {value.dtype}. "
                    f"{remedy} Do so in the loader, or by inputs=, a function from a batch to what the model is called "
                    "with."
                )
            if known.batched and value.ndim < known.axes:
                raise ConfigError(
                    f"{where}: expected a batch of {known.axes} axes, as in the example inputs, found shape "
                    f"{list(value.shape)}. Put a DataLoader around the data set, which makes batches of samples."
                )
        if self.samples(inputs) == 0:
            raise ConfigError(
                f"expected a sample at least, found none in {described(inputs)}. Leave empty batches out of the loader."
            )


# ---------------------------------------------------------------------- making and remembering a form


def form_of(inputs: ExampleInputs, model: nn.Module | None = None) -> InputForm:
    """The form of inputs.

    Args:
        inputs: what a model is called with.
        model: the model, for the names of its arguments.
    """
    known = forward_names(model)
    values, keywords = values_of(inputs), isinstance(inputs, Mapping)
    names = list(inputs) if isinstance(inputs, Mapping) else [*known, *[""] * len(values)][: len(values)]
    size = next((len(tensor) for tensor in tensors_in(values) if tensor.ndim), 0)
    return InputForm(
        tuple(_argument(str(name), value, size) for name, value in zip(names, values, strict=True)), keywords, known
    )


def _argument(name: str, value: object, size: int) -> Argument:
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and len(value) == size
        return Argument(name, "tensor", None, value.is_floating_point(), value.ndim, batched)
    if isinstance(value, _CONSTANTS):
        return Argument(name, "constant", value)
    kinds: dict[Kind, Any] = {"mapping": Mapping, "sequence": (tuple, list)}
    return Argument(name, next((kind for kind, types in kinds.items() if isinstance(value, types)), "object"))


def forward_names(model: nn.Module | None) -> tuple[str, ...]:
    """Names of the arguments of a model's forward; none where it takes any."""
    parameters = _parameters(model)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, parameter in parameters.items() if parameter.kind in named)


def _parameters(model: nn.Module | None) -> Mapping[str, inspect.Parameter]:
    if model is None:
        return {}
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a forward in C++
        return {}


def remember_form_(model: nn.Module, form: InputForm | None) -> None:
    """Keep a form with a model, or forget it.

    Args:
        model: the module that is prepared.
        form: of its example inputs.
    """
    if form is None:
        vars(model).pop(_ATTRIBUTE, None)
    else:
        vars(model)[_ATTRIBUTE] = form  # past __setattr__, which is the model's own


def known_form(model: nn.Module) -> InputForm | None:
    """The form that a model was prepared with, also inside a wrapper; None of a float model or a part of one.

    Args:
        model: prepared, deployed, or neither.
    """
    found = [vars(module)[_ATTRIBUTE] for module in model.modules() if _ATTRIBUTE in vars(module)]
    return found[0] if found and all(form == found[0] for form in found) else None


def guessed_inputs(batch: Any, model: nn.Module) -> ExampleInputs:  # noqa: ANN401  (whatever a loader yields)
    """The inputs in a batch of a model that was not prepared: by its forward's arguments, without labels.

    Labels stay for encoder-decoders of transformers, which make their decoder's inputs of them.

    Args:
        batch: what a loader yields.
        model: any.

    Returns:
        A tensor, a tuple of as many inputs as the forward must have, or a dict of those that it knows.

    Raises:
        ConfigError: if they are not found.
    """
    if isinstance(batch, Tensor):
        return batch
    named, items = as_mapping(batch), as_items(batch)
    parameters = _parameters(model).values()
    if named is not None and (items is None or not isinstance(batch, (tuple, list))):
        known = forward_names(model)  # none where the forward takes anything
        kept = "labels" if _decodes_labels(model) and "decoder_input_ids" not in named else None
        found = {
            key: value
            for key, value in named.items()
            if (key not in LABELS or key == kept) and (not known or key in known)
        }
        if next(tensors_in(found), None) is not None:
            return found
    elif items:
        positions = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        needed = sum(one.kind in positions and one.default is inspect.Parameter.empty for one in parameters)
        count, first = max(1, needed), items[0]
        if len(items) >= count and all(isinstance(item, Tensor) for item in items[:count]):
            return first if count == 1 else tuple(items[:count])
        if isinstance(first, (tuple, list)) and first and all(isinstance(item, Tensor) for item in first):
            most = sum(one.kind in positions for one in parameters)
            if count <= len(first) <= most:
                return tuple(first)
            if count == 1:
                return (first,)
        if as_mapping(first) is not None:
            return guessed_inputs(first, model)
    raise ConfigError(f"expected batches with tensors that the model takes, found {described(batch)}. {REMEDY}")


def _decodes_labels(model: nn.Module) -> bool:
    """Return whether a model of transformers makes its decoder's inputs of the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


# ---------------------------------------------------------------------- structures


def values_of(inputs: ExampleInputs) -> list[Any]:
    """The arguments of a call, without their names."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def as_mapping(batch: Any) -> Mapping[str, Any] | None:  # noqa: ANN401  (whatever a loader yields)
    """A batch by names: a mapping or what works like one, a dataclass, a named tuple; None for others."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, (Tensor, type)):
        return None
    if is_dataclass(batch):
        return {field.name: getattr(batch, field.name) for field in fields(batch)}
    if isinstance(batch, tuple):
        return batch._asdict() if hasattr(batch, "_asdict") else None
    if callable(getattr(batch, "keys", None)) and hasattr(batch, "__getitem__"):
        return {key: batch[key] for key in batch.keys()}  # noqa: SIM118  (a container of its own kind)
    return None


def as_items(batch: Any) -> list[Any] | None:  # noqa: ANN401  (whatever a loader yields)
    """A batch by positions: a tuple or list, or the fields of a dataclass; None for others."""
    if isinstance(batch, (tuple, list)):
        return list(batch)
    if is_dataclass(batch) and not isinstance(batch, (type, Mapping)):
        return [getattr(batch, field.name) for field in fields(batch)]
    return None


def the_rest(rest: Any, batch: object) -> Any:  # noqa: ANN401  (targets of any form)
    """Targets out of what is left of a batch: a list of items, or a mapping."""
    found = [rest[key] for key in LABELS if key in rest][:1] if isinstance(rest, Mapping) else rest
    if not found:
        raise ConfigError(
            f"loss_fn: expected batches (inputs, targets), found one without targets: {described(batch)}. Give targets "
            f"after the inputs, or under {', '.join(map(repr, LABELS))}; or leave loss_fn out to compare with the "
            "float model's own outputs."
        )
    return found[0] if len(found) == 1 else tuple(found)


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in mappings, tuples and lists, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:  # noqa: ANN401  (tensors in any structure)
    """Apply a function to the tensors in mappings, tuples and lists, however deep; other objects stay as they are.

    Args:
        function: from a tensor to a tensor.
        value: tensors in any structure.

    Returns:
        The same structure: mappings as dicts, other sequences as lists or tuples.

    Example:
        >>> map_tensors(torch.neg, {"x": [torch.ones(1)], "mode": "fast"})
        {'x': [tensor([-1.])], 'mode': 'fast'}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def cut(value: Any, start: int, stop: int, size: int) -> Any:  # noqa: ANN401  (tensors in any structure)
    """Some samples of a tensor, or of those in mappings, tuples and lists, that have one entry for each sample.

    Args:
        value: tensors in any structure; those whose first axis is not ``size`` long stay whole.
        start: the first sample.
        stop: the one after the last.
        size: samples in the batch.
    """
    return map_tensors(lambda x: x[start:stop] if x.ndim and len(x) == size else x, value)


def described(value: object, depth: int = 1) -> str:
    """A batch in a few words.

    Example:
        >>> described((torch.zeros(2, 3), {"labels": torch.zeros(2)}))
        "tuple (float32 [2, 3], dict of 'labels')"
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    kind = type(value).__name__
    named = as_mapping(value)
    if named is not None:
        return f"{kind} of {', '.join(map(repr, list(named)[:8]))}" if named else f"an empty {kind}"
    if isinstance(value, (tuple, list)):
        if not value:
            return f"an empty {kind}"
        few = [described(item, depth - 1) for item in list(value)[:4]] if depth > 0 else [f"{len(value)} items"]
        return f"{kind} ({', '.join([*few, *['...'] * (depth > 0 and len(value) > 4)])})"
    return kind if value is not None else "None"


def described_inputs(inputs: ExampleInputs) -> str:
    """Describe a model's inputs in a few words.

    Example:
        >>> described_inputs({"x": torch.zeros(2, 3)})
        'x=float32 [2, 3]'
    """
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}={described(value)}" for name, value in inputs.items())
    return ", ".join(map(described, values_of(inputs)))


def left_over(batch: Any, inputs: ExampleInputs) -> Any:  # noqa: ANN401  (whatever a loader yields)
    """The rest of a batch without inputs that a function took from it: a list of items, or a mapping.

    Args:
        batch: what a loader yields.
        inputs: what the function returned.

    Returns:
        Items none of whose tensors are among the inputs; all but the first if the function made tensors of its own.
    """
    named, items = as_mapping(batch), as_items(batch)
    if items is None or (named is not None and any(key in named for key in LABELS)):
        return named or []
    if any(item is inputs for item in items):
        return [item for item in items if item is not inputs]
    used = {id(tensor) for tensor in tensors_in(inputs)}
    left = [item for item in items if not used & {id(tensor) for tensor in tensors_in(item)}]
    return left if len(left) < len(items) else items[1:]
