"""Test a layer whose forward is its own: is it the operation and a bias, the operation and more, or not to be trusted?

The trace keeps the arguments of such a layer's first call. A copy of the layer is then run on random values of these
shapes, with several weights, inputs and biases, while a ``TorchFunctionMode`` watches how weight and input reach the
operation. Nothing of the layer, its buffers or the state of any random number generator changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from nipq.nn.kinds import (
    along_channels,
    channel_dim,
    is_table,
    kind_of,
    output_channels,
    weight_channel_axis,
    weight_uses,
)
from nipq.nn.layers import Form
from nipq.prepare.batches import copy_of, evaluating, tensors_in

#: Methods and attributes that decide what a layer computes.
_DECISIVE = (
    *("forward", "_conv_forward", "_output_padding", "__call__", "_call_impl"),
    *("__getattr__", "__getattribute__", "weight", "bias"),
)
#: Products of a weight and an input, by the last part of their torch names.
_PRODUCTS = frozenset(
    [f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3)]
    + ["convolution", "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "mv", "einsum", "tensordot"]
    + ["addmm", "addbmm", "baddbmm", "addmv"]
)
#: Ways to look rows up.
_LOOKUPS = frozenset(("embedding", "getitem", "index_select", "index", "take_along_dim", "gather"))
#: Weights with more elements than this are tested in their own type; tables of this size with one row that repeats.
_LARGE = 2**22


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`.

    Attributes:
        form: how the forward relates to the layer's operation; None if the layer has to be refused.
        problem: reason to refuse it, empty otherwise.
        uses: multiplications with the whole weight, for each that input and output of the layer suggest: more than 1
            where the layer pools or cuts its result.
    """

    form: Form | None
    problem: str = ""
    uses: float = 1.0


class Call(NamedTuple):
    """Arguments of one call of a layer."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether a supported layer may compute anything else than the layer of its kind does.

    Args:
        layer: a supported layer.

    Example:
        >>> has_own_forward(nn.Linear(1, 1)), has_own_forward(type("Mine", (nn.Linear,), {"forward": abs})(1, 1))
        (False, True)
    """
    kind = kind_of(layer)
    differs = any(getattr(type(layer), name, None) is not getattr(kind, name, None) for name in _DECISIVE)
    return differs or any(name in vars(layer) for name in _DECISIVE)


@torch.no_grad()
def probe(layer: nn.Module, call: Call) -> Probe:
    """Find out by trying whether a layer computes its operation and a bias, and nothing else.

    Args:
        layer: a supported layer with a forward of its own, and a plain parameter as its weight; it is not changed.
        call: arguments that the layer was called with.

    Returns:
        Its form, or the reason to refuse it.
    """
    if any(name in vars(layer) for name in _DECISIVE):
        return Probe(None, "the forward of this very layer was replaced")
    first = call.args[0] if call.args else next(tensors_in(call.kwargs), None)
    if not isinstance(first, Tensor) or not (first.is_floating_point() or is_table(layer)):
        floats = "" if is_table(layer) else " of floats, so its input cannot be quantized"
        return Probe(None, f"its first argument is no tensor{floats}")
    exact = layer.weight.numel() <= _LARGE  # type: ignore[operator]  # a module, to torch
    error: Exception | None = None
    for dtype in (torch.float64, None) if exact else (None,):
        try:
            with _random_states_kept(layer), evaluating(layer):  # which a closure in the copy may lead to
                return _probe(_Trial(layer, call, dtype))
        except Exception as caught:  # the forward is foreign code
            error = error or caught
    return Probe(None, f"its own forward cannot be tested on random values ({type(error).__name__}: {error})")


@contextmanager
def _random_states_kept(layer: nn.Module) -> Iterator[None]:
    devices = {tensor.device for tensor in (*layer.parameters(), *layer.buffers()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        yield


@dataclass
class _Run:
    """One call of the copy: its output, and the operands and the result of the operation.

    Attributes:
        products: operands (input, weight) and result of every operation that weight and input meet in.
        reads_more: whether an operation read a tensor that is neither input, weight nor bias, nor made from them.
    """

    output: object = None
    products: list[tuple[Tensor | None, Tensor, Tensor]] = field(default_factory=list)
    reads_more: bool = False

    @property
    def y(self) -> Tensor:
        assert isinstance(self.output, Tensor)
        return self.output

    @property
    def weight(self) -> Tensor:
        return self.products[0][1]

    @property
    def input(self) -> Tensor:
        found = self.products[0][0]
        assert found is not None
        return found


class _ReachedError(BaseException):
    """The operation was reached, and what it gives is not asked for; no handler of a forward catches this."""


class _Watch(TorchFunctionMode):
    """Follow weight and input through a forward, up to the operation in which they meet.

    Args:
        run: filled in.
        weight: the layer's weight.
        x: its input, None for a table.
        others: tensors that the layer has or is given beside these.
        stop: end the forward in front of the operation.
    """

    def __init__(self, run: _Run, weight: Tensor, x: Tensor | None, others: list[Tensor], *, stop: bool) -> None:
        super().__init__()
        self.run, self.is_table, self.stop = run, x is None, stop
        self.of_weight, self.of_input = {id(weight)}, set() if x is None else {id(x)}
        self.others = {id(other) for other in others}
        self.keep: list[object] = [weight, x, others]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401  (torch's own signature)
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        operands = [*tensors_in(args), *tensors_in(kwargs or {})]
        name = str(resolve_name(func) or getattr(func, "__name__", "?")).rsplit(".", 1)[-1]
        plain = name.strip("_")
        weights = [tensor for tensor in operands if id(tensor) in self.of_weight]
        inputs = [tensor for tensor in operands if id(tensor) in self.of_input]
        meets = bool(weights) and (plain in _LOOKUPS if self.is_table else plain in _PRODUCTS and bool(inputs))
        if meets and self.stop:
            self.run.products.append((inputs[0] if inputs else None, weights[0], weights[0]))
            raise _ReachedError
        result = func(*args, **(kwargs or {}))
        results = list(tensors_in(result))
        if not results and name != "__setitem__":
            return result  # shape, dim(), dtype
        self.keep.append((operands, results))
        self.run.reads_more |= any(id(tensor) in self.others for tensor in operands)
        if meets:
            self.run.products.append((inputs[0] if inputs else None, weights[0], results[0]))
            return result
        changed = operands[:1] if name.endswith("_") else []
        for found, ids in ((weights, self.of_weight), (inputs, self.of_input)):
            if found:
                ids.update(id(tensor) for tensor in (*results, *changed))
        return result


class _Trial:
    """A copy of a layer that can be called with any weight, input and bias.

    Args:
        layer: as given to :func:`probe`.
        call: likewise.
        dtype: type of all floats; None for the layer's own.
    """

    def __init__(self, layer: nn.Module, call: Call, dtype: torch.dtype | None) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        empty = nn.Parameter(weight.new_empty(0), requires_grad=weight.requires_grad)
        self.layer = copy_of(layer, {id(weight): empty}).eval()  # without its weight, which may be large
        for module in self.layer.modules():  # hooks belong to the model, not to what the layer computes
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        if dtype is not None:
            self.layer.to(dtype)
        del self.layer._parameters["weight"]
        self.dtype, self.device, self.shape = dtype or weight.dtype, weight.device, weight.shape
        self.close = 1e-9 if self.dtype == torch.float64 else 1e-4 if self.dtype == torch.float32 else 3e-2
        self.seed = torch.Generator().manual_seed(0)
        self.is_table = is_table(layer)
        self.args, self.kwargs = _like(call.args, dtype), _like(dict(call.kwargs), dtype)
        self.key: str | int = 0 if self.args else next((k for k, v in self.kwargs.items() if isinstance(v, Tensor)), 0)
        first = None if self.is_table else (self.args or self.kwargs)[self.key]
        self.x = None if first is None else self.random(first.shape)
        self.x_dtype = None if first is None else first.dtype
        bias = getattr(layer, "bias", None)
        self.bias = None if bias is None else self.random(bias.shape)
        self.writes = False
        self.state = {key: value.clone() for key, value in self._tensors().items()}
        #: Numbers among the attributes, once a call has filled in those that it keeps (``cached_property``).
        self.numbers: dict[str, int | float] = {}

    def random(self, shape: tuple[int, ...]) -> Tensor:
        """Normal values away from 0, the same for the same sequence of calls."""
        if self.is_table and shape == self.shape and shape.numel() > _LARGE:
            return self.random(torch.Size([1, *shape[1:]])).expand(shape)
        values = torch.randn(shape, generator=self.seed, dtype=torch.float64)
        return (values + values.sign() * 0.1).to(self.device, self.dtype)

    def run(
        self,
        weight: Tensor,
        x: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        no_bias: bool = False,
        stop: bool = False,
    ) -> _Run:
        """Call the copy.

        Args:
            weight: its weight.
            x: its input, the first random one if left out.
            bias: its bias, the random one if left out.
            no_bias: call it without the parameter.
            stop: end the forward in front of the operation, where its result is not asked for.
        """
        given = weight
        weight = weight.view_as(weight) if self.is_table and weight.numel() > _LARGE else weight.clone()
        self.layer.__dict__["weight"] = weight  # no parameter, nor is it once quantized
        x = self.x if x is None else x
        args, kwargs = list(self.args), dict(self.kwargs)
        if x is not None:
            x = x.to(self.x_dtype).clone()
            (args if isinstance(self.key, int) else kwargs)[self.key] = x  # type: ignore[index]
        own = self.layer._parameters.get("bias")
        if own is not None:
            value = self.bias if bias is None else bias
            self.layer._parameters["bias"] = None if no_bias else nn.Parameter(value, requires_grad=False)  # type: ignore[arg-type]
        known = [weight, x, self.layer._parameters.get("bias")]
        others = [*self.layer.parameters(), *self.layer.buffers(), *tensors_in((args, kwargs))]
        found = _Run()
        try:
            others = [tensor for tensor in others if not any(tensor is one for one in known)]
            with _Watch(found, weight, x, others, stop=stop):
                found.output = self.layer.forward(*args, **kwargs)
        except _ReachedError:
            pass
        finally:
            if own is not None:
                self.layer._parameters["bias"] = own
        self.writes |= not torch.equal(weight, given)
        return found

    def changed_itself(self) -> bool:
        """Return whether a buffer, another parameter or a number of the copy is another one than at the start."""
        now = self._tensors()
        same = now.keys() == self.state.keys() and all(torch.equal(now[key], self.state[key]) for key in now)
        return not same or self.numbers_now() != self.numbers

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.layer.named_buffers()) | dict(self.layer.named_parameters())

    def numbers_now(self) -> dict[str, int | float]:
        """Numbers and switches among the attributes of the copy and its submodules."""
        return {
            f"{name}.{key}": value
            for name, module in self.layer.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, float)) and key not in ("_version", "training")
        }

    def same(self, a: object, b: object) -> bool:
        """Return whether two tensors are alike up to rounding."""
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
            return False
        if a.numel() == 0:
            return True
        scale = max(float(a.abs().max()), float(b.abs().max()), 1e-300)
        return float((a - b).abs().max()) <= self.close * scale


def _like(value: Any, dtype: torch.dtype | None) -> Any:  # noqa: ANN401  (arguments in any form)
    """Arguments with floats of another type."""
    if isinstance(value, Tensor):
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _like(item, dtype) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_like(item, dtype) for item in value)
    return value


def _probe(trial: _Trial) -> Probe:
    layer, weight = trial.layer, trial.random(trial.shape)
    state = torch.get_rng_state()
    first = trial.run(weight)
    trial.numbers = trial.numbers_now()
    if not torch.equal(state, torch.get_rng_state()):
        return Probe(None, "its own forward draws random numbers in evaluation mode")
    if not isinstance(first.output, Tensor):
        return Probe(None, f"its own forward returns a {type(first.output).__name__}, not one tensor")
    if len(first.products) != 1:
        what = "looks its weight up" if trial.is_table else "multiplies its first argument with its weight"
        return Probe(None, f"its own forward {what} {len(first.products)} times, not once")
    if trial.writes:
        return Probe(None, "its own forward writes into its weight")
    if not _is_scaled(trial, first.weight, weight, lambda w: trial.run(w, stop=True).weight, by_channel=True):
        return Probe(
            None,
            "its own forward computes another weight from its weight (as weight standardisation and normalisation do), "
            "and codes of the one are no codes of the other",
        )
    if trial.x is not None and not _is_scaled(
        trial, first.input, trial.x, lambda x: trial.run(weight, x, stop=True).input, by_channel=False
    ):
        return Probe(None, "its own forward changes its input (by a norm or an activation) before it multiplies")
    form: Form = "kept" if trial.is_table or not _is_linear(trial, first, weight) else "linear"
    again = trial.run(weight)
    if trial.changed_itself():
        return Probe(None, "its own forward changes its buffers, parameters or counters in evaluation mode")
    if not trial.same(first.output, again.output):
        return Probe(None, "its own forward gives another result for the same input when it is called again")
    suggested = 0 if trial.x is None else weight_uses(layer, trial.x, first.output)
    return Probe(form, uses=weight_uses(layer, first.input, first.products[0][2]) / suggested if suggested else 1.0)


def _is_scaled(
    trial: _Trial, found: Tensor, value: Tensor, reach: Callable[[Tensor], Tensor], *, by_channel: bool
) -> bool:
    """Return whether what reaches the operation holds the elements of a tensor, each times 0 or one factor.

    Any order and shape will do, padding too. The factor of a weight may differ between its channels.

    Args:
        trial: the copy under test.
        found: what reached the operation for ``value``.
        value: the weight or the input.
        reach: what reaches the operation, as a function of either.
        by_channel: for a weight.
    """
    if by_channel and found is trial.layer.__dict__["weight"]:
        return True  # the very tensor
    other, signs = trial.random(value.shape), trial.random(value.shape).sign()
    linear = (
        trial.same(reach(value + other), found + reach(other))
        and trial.same(reach(value * 1e3), found * 1e3)
        and trial.same(reach(value * 1e-3), found * 1e-3)
    )
    if not linear or not trial.same(reach(value * signs).abs(), found.abs()):
        return False  # the second: a sum of two elements takes other magnitudes where one of them flips
    factors, groups = reach(torch.ones_like(value)), torch.zeros_like(found)
    used = factors != 0
    if by_channel:
        axis = weight_channel_axis(trial.layer)
        shape = [-1 if dim == axis else 1 for dim in range(value.ndim)]
        places = torch.arange(1, value.shape[axis] + 1, device=value.device, dtype=value.dtype).reshape(shape)
        groups = reach(places.expand_as(value).contiguous())
        groups[used] = (groups[used] / factors[used]).round()
    order = groups[used].argsort()
    keys, sizes = groups[used][order], factors[used].abs()[order]
    within = keys[1:] == keys[:-1]
    return trial.same(sizes[1:][within], sizes[:-1][within])


def _is_linear(trial: _Trial, first: _Run, weight: Tensor) -> bool:
    """Return whether the layer is its operation on input and weight, plus its bias along its channels."""
    layer, x = trial.layer, trial.x
    assert x is not None
    channels, dim = output_channels(layer), channel_dim(layer)
    zero = None if trial.bias is None else torch.zeros_like(trial.bias)
    base = trial.run(weight, bias=zero)
    if first.reads_more or base.y.ndim < -dim or base.y.shape[dim] != channels:
        return False
    if (
        not _unscaled(first.weight, weight)
        or not _unscaled(first.input, x)
        or not _unscaled(base.y, base.products[0][2])
    ):
        return False
    other_x, other_w = trial.random(x.shape), trial.random(weight.shape)
    gains = trial.random(torch.Size([channels]))
    lengthways = [-1] + [1] * (-dim - 1)
    return (
        trial.same(trial.run(weight, x + other_x, zero).y, base.y + trial.run(weight, other_x, zero).y)
        and trial.same(trial.run(weight, x * 1e3, zero).y, base.y * 1e3)
        and trial.same(trial.run(weight, -x, zero).y, -base.y)
        and trial.same(trial.run(weight + other_w, x, zero).y, base.y + trial.run(other_w, x, zero).y)
        and trial.same(
            trial.run(weight * along_channels(gains, layer, weight), x, zero).y, base.y * gains.reshape(lengthways)
        )
        and (
            trial.bias is None
            or (trial.same(first.y, base.y + trial.bias.reshape(lengthways)) and _without_bias(trial, weight, base.y))
        )
    )


def _without_bias(trial: _Trial, weight: Tensor, expected: Tensor) -> bool:
    """Return whether the forward can do without the parameter, as whole sums need it."""
    try:
        return trial.same(trial.run(weight, no_bias=True).output, expected)
    except Exception:  # the forward is foreign code
        return False


def _unscaled(found: Tensor, among: Tensor) -> bool:
    """Return whether every element is one of another tensor, or 0."""
    return bool((torch.isin(found, among.to(found.dtype)) | (found == 0)).all())
