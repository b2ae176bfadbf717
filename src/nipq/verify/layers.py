"""Rungs E1 and E3: layer by layer in whole codes.

For E1 the trained model runs in phase ``"round"`` and the input of every layer is kept. The deployed model then runs
with each layer's input *replaced* by the kept one, so that a layer answers for itself only. What had arrived there is
looked at first: its codes show all that happened since the layers before, be it a folded batch norm, an activation or a
sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nipq.deploy.modules import DeployedLayer, deployed_layers
from nipq.layer_table import LayerRow
from nipq.nn.quantizer import InputQuantizer
from nipq.verify.evidence import Evidence


@dataclass
class Calls:
    """What went into each layer and came out, call by call.

    Attributes:
        inputs: by layer, before quantization.
        codes: by layer, the whole codes of those inputs; nothing for layers whose input stays float.
        outputs: by layer, after the batch norm that is folded into it.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    codes: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))


@contextmanager
def recording(rows: dict[str, LayerRow]) -> Iterator[Calls]:
    """Keep what happens in the layers of a trained model while the context lasts.

    Args:
        rows: layers by name.

    Yields:
        The calls, filled as the model runs.
    """
    calls = Calls()
    handles = []
    for name, row in rows.items():
        inputs, outputs, batchnorm = calls.inputs[name], calls.outputs[name], None
        if row.input is None:
            handles.append(row.layer.register_forward_pre_hook(_keep_first(inputs), with_kwargs=True))
        else:
            handles.append(row.input.register_forward_pre_hook(_keep_first(inputs), with_kwargs=True))
            batchnorm = row.batchnorm
        handles.append((batchnorm or row.layer).register_forward_hook(_keep_output(outputs)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    for name, row in rows.items():
        if row.input is not None:
            calls.codes[name] = [row.input.codes(x.float()) for x in calls.inputs[name]]


def run_forced(
    deployed: nn.Module, trained: Calls, evidence: dict[str, Evidence], run: Callable[[nn.Module], Any]
) -> None:
    """Run the deployed model with every layer's input replaced by the trained one, and note what differs (E1).

    Args:
        deployed: the deployed model.
        trained: calls of the trained model in phase ``"round"``.
        evidence: by layer, added to.
        run: calls a model on the batch.
    """
    done: dict[str, int] = defaultdict(int)
    handles = []

    def before(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        call, seen = done[name], evidence[name]
        done[name] += 1
        arrived = first_tensor(args, kwargs)
        if call >= len(trained.inputs[name]) or trained.inputs[name][call].shape != arrived.shape:
            seen.calls_differ = True
            return None
        kept = trained.inputs[name][call].to(arrived.device)
        if isinstance(layer, DeployedLayer):
            codes = trained.codes[name][call].to(arrived.device)
            seen.add_codes(codes, layer.codes(kept), layer.codes(arrived))
        if args:
            return (kept, *args[1:]), kwargs
        return args, {key: kept if value is arrived else value for key, value in kwargs.items()}

    def after(name: str, output: Tensor) -> None:
        call, seen = done[name] - 1, evidence[name]
        if call >= len(trained.outputs[name]) or trained.outputs[name][call].shape != output.shape:
            seen.calls_differ = True
            return
        seen.add_output(trained.outputs[name][call].to(output.device), output)

    for name, layer in deployed_layers(deployed).items():
        evidence.setdefault(name, Evidence())
        handles.append(layer.register_forward_pre_hook(_named(before, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(lambda _layer, _args, output, name=name: after(name, output)))
    try:
        run(deployed)
    finally:
        for handle in handles:
            handle.remove()
    for name, kept in trained.inputs.items():
        evidence.setdefault(name, Evidence()).calls_differ |= done[name] != len(kept)


@contextmanager
def recording_integers(rows: Mapping[str, LayerRow]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what the input quantizers return while the context lasts; in phase ``"int"`` whole codes.

    Args:
        rows: layers by name.

    Yields:
        Codes by layer, call by call.
    """
    codes: dict[str, list[Tensor]] = {name: [] for name, row in rows.items() if row.input is not None}
    with ExitStack() as stack:
        for name, kept in codes.items():
            quantizer = rows[name].input
            assert isinstance(quantizer, InputQuantizer)
            handle = quantizer.register_forward_hook(lambda _module, _args, output, kept=kept: kept.append(output))
            stack.callback(handle.remove)
        yield codes


@contextmanager
def recording_codes(deployed: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the whole codes that go into each deployed layer while the context lasts.

    Args:
        deployed: the deployed model.

    Yields:
        Codes by layer, call by call.
    """
    codes: dict[str, list[Tensor]] = {}
    handles = []

    def keep(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, DeployedLayer)
        codes[name].append(layer.codes(first_tensor(args, kwargs)))

    for name, layer in deployed_layers(deployed).items():
        if isinstance(layer, DeployedLayer):
            codes[name] = []
            handles.append(layer.register_forward_pre_hook(_named(keep, name), with_kwargs=True))
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()


def compare_codes(
    trained: dict[str, list[Tensor]], deployed: dict[str, list[Tensor]], evidence: dict[str, Evidence]
) -> None:
    """Note every code that differs between two runs (E3).

    Args:
        trained: codes by layer of the trained model in phase ``"int"``.
        deployed: codes by layer of the deployed model.
        evidence: by layer, added to.
    """
    for name in {**trained, **deployed}:
        ours, theirs = trained.get(name, []), deployed.get(name, [])
        seen = evidence.setdefault(name, Evidence())
        if [codes.shape for codes in ours] != [codes.shape for codes in theirs]:
            seen.calls_differ = True
            continue
        for a, b in zip(ours, theirs, strict=True):
            seen.exact_codes += int((a != b.to(a.device)).sum())


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input among the arguments of a layer's call."""
    found: Tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
    return found


def _named(hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda layer, args, kwargs: hook(name, layer, args, kwargs)


def _keep_first(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(first_tensor(args, kwargs).detach().clone())  # a later layer may overwrite it in place

    return hook


def _keep_output(kept: list[Tensor]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        kept.append(output.detach().clone())

    return hook
