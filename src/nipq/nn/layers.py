"""Attaching quantizers to an existing layer, detaching them, and running the layer on whole codes.

The weight goes through ``torch.nn.utils.parametrize``; the input goes through a forward pre-hook that calls
``layer.quantization.input``. The layer keeps its class, its forward and its place in the model.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nipq.errors import ConfigError, OrderError
from nipq.nn.integer import bias_of, fold, integer_forward, needs_float64
from nipq.nn.kinds import channel_dim, output_channels, run_operation, weight_channel_axis
from nipq.nn.quantizer import InputQuantizer, TensorQuantizer, WeightQuantizer
from nipq.nn.relu import fold_relu, unfold_relu
from nipq.nn.shells import plain_shell

#: ``"plain"``: the forward of the layer's kind. ``"linear"``: one of its own that was found to compute the operation
#: and a bias, nothing else; both run on whole codes once deployed. ``"kept"``: one of its own that does more, such as a
#: gain or an activation; the deployed layer runs it on the quantized input and a float weight made of the codes.
Form = Literal["plain", "linear", "kept"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Facts about a layer that its costs follow from, measured by one traced forward; all counts for one sample.

    Attributes:
        name: full name in the model.
        kind: class name of the layer, such as ``"Conv2d"``.
        macs: multiply-accumulates, summed over the calls.
        weight_count: elements of the weight.
        activation_count: elements of the input, summed over the calls.
        other_count: elements of what stands for the weight of a product of two computed tensors, likewise.
        output_count: elements of the output, summed over the calls.
        calls: how often one forward calls the layer.
        batchnorm: full name of the batch norm that alone reads the output, or None.
        is_input: whether the layer reads the model's own input.
        relu: full name of the ReLU right in front, whose result the layer alone reads, or None.
        tied_to: for a table, full name of the layer that multiplies with the same weight, or None.
        is_table: whether the weight is looked up, not multiplied with.
        form: how the layer's forward relates to its operation, see :data:`Form`.
    """

    name: str
    kind: str
    macs: int
    weight_count: int
    activation_count: int
    output_count: int
    calls: int
    batchnorm: str | None
    is_input: bool
    relu: str | None = None
    tied_to: str | None = None
    other_count: int = 0
    is_table: bool = False
    form: Form = "plain"

    @property
    def is_product(self) -> bool:
        """True if two computed tensors are multiplied, so that there is no weight to store."""
        return self.weight_count == 0


class LayerQuantization(nn.Module):
    """Submodule ``quantization`` that ``prepare_`` adds to a layer: its facts and its input quantizer.

    Args:
        spec: facts about the layer.
        input_quantizer: quantizer of the layer's input, or None when the input stays float.
        order: place of the layer in the order of execution.
        computed: of a product of two computed tensors, quantizer of the second one, which stands for the weight.
    """

    def __init__(
        self,
        spec: LayerSpec,
        input_quantizer: InputQuantizer | None,
        order: int = 0,
        computed: InputQuantizer | None = None,
    ) -> None:
        super().__init__()
        self.computed = computed
        self.spec = spec
        self.order = order
        self.input = input_quantizer
        #: Limits that the bit-widths were frozen within, by name; None before, or where there was no budget.
        self.frozen_within: dict[str, float] | None = None
        #: The batch norm folded into the layer while in phase ``int``; in a tuple, so that it is not a submodule.
        self.folded: tuple[nn.Module, ...] = ()
        #: Whether the weight and its quantizer are the layer's own, or those of a layer before it.
        self.owns_weight = True
        #: The ReLU in front that training leaves out, see ``nipq.nn.relu``; in a tuple likewise.
        self.relu: tuple[nn.Module, ...] = ()


def weight_quantizer(layer: nn.Module) -> TensorQuantizer:
    """The weight quantizer of a prepared layer, or that of what stands for a weight."""
    computed = quantization(layer).computed
    if computed is not None:
        return computed
    quantizer = layer.parametrizations.weight[0]  # type: ignore[union-attr, index]  # torch types it as a module
    assert isinstance(quantizer, WeightQuantizer)
    return quantizer


def float_weight(layer: nn.Module) -> nn.Parameter:
    """The float weight that training moves, of a prepared layer or of a plain one."""
    return layer.get_parameter("parametrizations.weight.original" if is_prepared(layer) else "weight")


def quantization(layer: nn.Module) -> LayerQuantization:
    """The :class:`LayerQuantization` of a prepared layer."""
    found = layer.quantization
    assert isinstance(found, LayerQuantization)
    return found


def is_prepared(layer: nn.Module) -> bool:
    """Return whether :func:`attach` was called on this very layer."""
    parts = layer._modules  # not getattr, as wrappers give attributes of their layer; a compiled module's has no get
    return "quantization" in parts and isinstance(parts["quantization"], LayerQuantization)


def check_module(model: object, command: str | None = None) -> None:
    """Refuse what is no module, before anything is done with it.

    Args:
        model: what a caller gave for a model.
        command: the function that it was given to, for the message, where it is known.

    Raises:
        ConfigError: if it is no ``torch.nn.Module``, or one that TorchScript compiled.
    """
    where = "" if command is None else f"{command}: "
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"{where}expected a module with Python code, found one compiled by TorchScript. Give the module that it "
            "was made from."
        )
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ConfigError(f"{where}expected a model (torch.nn.Module), found {found}. Give the network itself.")


def attach(layer: nn.Module, weight: WeightQuantizer, record: LayerQuantization, relu: nn.Module | None = None) -> None:
    """Quantize the layer's weight and input from now on.

    Args:
        layer: a supported layer, see ``nipq.nn.kinds``.
        weight: quantizer of its weight; layers with a tied weight get the same one.
        record: facts and input quantizer.
        relu: the ReLU in front that the input quantizer may replace.
    """
    if relu is not None and record.input is not None:
        fold_relu(relu, record.input)
        record.relu = (relu,)
    # unsafe: the safe form runs a forward, which needs a calibrated clipping range and draws random numbers.
    parametrize.register_parametrization(layer, "weight", weight, unsafe=True)
    type(layer).register_parameter = _register_parameter  # type: ignore[method-assign, assignment]  # its own class
    layer.quantization = record
    layer.train(layer.training)  # new modules start in training mode, whatever the layer is in
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    layer.register_state_dict_post_hook(_own_copies)  # type: ignore[no-untyped-call]  # torch gives it no type
    layer.register_load_state_dict_pre_hook(_accept_float_checkpoint)  # type: ignore[no-untyped-call]  # torch gives it no type


def detach(layer: nn.Module) -> None:
    """Take off what :func:`attach` put on; the float weight is the parameter it was before.

    Args:
        layer: a prepared layer.
    """
    leave_integer_domain(layer)
    for relu in quantization(layer).relu:
        unfold_relu(relu)
    del layer.quantization
    others = [name for name in layer._parameters if name != "weight"]
    # A deep copy shares the class that torch made for the parametrization; changing that would break the other one.
    kind = type(layer)
    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    for name in others:  # the weight comes first again: optimizers and state dicts go by the order
        layer._parameters[name] = layer._parameters.pop(name)
    for key, hook in list(layer._forward_pre_hooks.items()):
        if hook is _quantize_input:
            del layer._forward_pre_hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, hook in list(layer._state_dict_hooks.items()):
        if hook is _own_copies:
            del layer._state_dict_hooks[key]
    for key, hook in list(layer._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is _accept_float_checkpoint:
            del layer._load_state_dict_pre_hooks[key]


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    quantizer = quantization(layer).input
    if quantizer is None:
        return args, kwargs
    if args:
        return (quantizer(args[0]), *args[1:]), kwargs
    name = next(key for key, value in kwargs.items() if isinstance(value, Tensor))  # "input", unless a subclass renames
    return args, {**kwargs, name: quantizer(kwargs[name])}


def _register_parameter(layer: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """As torch's, but ``layer.weight = nn.Parameter(w)`` replaces the values of the float weight."""
    if name != "weight" or param is None or not parametrize.is_parametrized(layer, "weight"):
        nn.Module.register_parameter(layer, name, param)
        return
    weight = float_weight(layer)
    if param is not weight:
        layer.weight = param.detach().clone()
        weight.requires_grad_(param.requires_grad)


def _own_copies(layer: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object) -> None:
    """Give a tied layer copies of its own in a state dict: programs that save refuse tensors that share memory."""
    if quantization(layer).owns_weight:
        return
    for key, value in state_dict.items():
        if key.startswith(f"{prefix}parametrizations.weight.") and not isinstance(value, nn.Parameter):
            state_dict[key] = value.clone()


def _accept_float_checkpoint(
    layer: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    *_rest: Any,  # noqa: ANN401  (torch passes four more that are not needed)
) -> None:
    """Rename a float checkpoint's ``weight``; quantizers keep their values, for such a file has none."""
    record = quantization(layer)
    if local_metadata.get("assign_to_params_buffers") and not record.owns_weight:
        raise OrderError(
            f"{record.spec.name}: expected a state dict to be copied into a weight that another layer has, too, found "
            "assign=True, after which each would have its own. Call load_state_dict without it."
        )
    weight = state_dict.pop(prefix + "weight", None)
    if weight is None:
        return
    state_dict[prefix + "parametrizations.weight.original"] = weight
    for key, value in layer.state_dict().items():
        if key.startswith(("parametrizations.weight.0.", "quantization.")):
            state_dict.setdefault(prefix + key, value)


# ---------------------------------------------------------------------- phase "int"


def enter_integer_domain(layer: nn.Module, batchnorm: nn.Module | None) -> None:
    """Make the layer compute with whole codes, the batch norm after it folded into one multiply and one add.

    Args:
        layer: a prepared layer whose input is quantized and whose quantizers are in phase ``int``.
        batchnorm: the batch norm that alone reads the layer's output, or None; it passes its input on meanwhile.
    """
    record = quantization(layer)
    record.folded = () if batchnorm is None else (batchnorm,)
    # Bound methods, not closures: a deep copy of the model rebinds them to its own modules.
    layer.forward = types.MethodType(_integer_domain_forward, layer)
    if batchnorm is not None:
        batchnorm.forward = types.MethodType(_pass_on, batchnorm)


def leave_integer_domain(layer: nn.Module) -> None:
    """Undo :func:`enter_integer_domain`; no effect otherwise.

    Args:
        layer: a prepared layer.
    """
    layer.__dict__.pop("forward", None)
    record = quantization(layer)
    for batchnorm in record.folded:
        batchnorm.__dict__.pop("forward", None)
    record.folded = ()


def _pass_on(_module: nn.Module, input: Tensor) -> Tensor:
    return input


@torch.no_grad()
def _integer_domain_forward(layer: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """The layer on whole codes: the pre-hook already turned ``input`` into codes."""
    record, quantizer = quantization(layer), weight_quantizer(layer)
    assert record.input is not None
    if layer.training:
        raise OrderError(
            f'{record.spec.name}: expected evaluation mode in phase "int", found training mode. '
            'Call model.eval() first, or set_phase_(model, "round") to train.'
        )
    weight = quantizer.codes(float_weight(layer))
    shell, dim = plain_shell(layer), channel_dim(layer)
    float64 = needs_float64(weight, *record.input.code_range(), weight_channel_axis(layer))
    batchnorm = record.folded[0] if record.folded else None
    scale, offset = fold(record.input.step(), quantizer.step(), bias_of(layer), batchnorm, output_channels(layer))

    def run(x: Tensor, codes: Tensor) -> Tensor:
        shell._buffers["weight"] = codes
        return run_operation(shell, x, codes, None, *args, **kwargs)

    y = integer_forward(run, input, weight, scale, offset, dim, float64)
    return y.to(float_weight(layer).dtype)
