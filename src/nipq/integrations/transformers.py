"""NIPQ in transformers' ``Trainer``: one call before ``train``.

::

    trainer = Trainer(model, args, train_dataset=..., eval_dataset=...)
    quantize(trainer, nipq.AverageBits(weights=4, activations=4))
    trainer.train()

``Trainer`` offers three ways to a loss term. ``compute_loss_func`` replaces the model's own loss and takes the labels
away from it; callbacks see gradients, but neither loss nor graph. ``compute_loss`` is the method that its documentation
tells everybody to override, so :func:`quantize` overrides it, and ``create_optimizer`` likewise, on this one trainer:
what a subclass, label smoothing or ``compute_loss_func`` do stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from nipq.budget.budget import Budget
from nipq.config import Config
from nipq.errors import ConfigError, OrderError
from nipq.files import written_whole
from nipq.integrations.shared import check_alone, gradient_of, leave_bits_unclipped_, spread_seeds, supported
from nipq.nn.attention import PRODUCTS
from nipq.nn.layers import is_prepared
from nipq.prepare.batches import BatchReader
from nipq.prepare.prepare import prepare_
from nipq.qat.optim import check_learned, check_optimizer, drop_frozen_on_load_, learn_quantizers_, param_groups
from nipq.qat.session import QATSession, calibrate_and_allocate_, is_calibrated

_library = supported("transformers", least=(5, 0), extra="hf")

#: A ``transformers.Trainer``, and what it hands to its callbacks.
Trainer: TypeAlias = Any
Given: TypeAlias = Any

#: Learning rates of bit-widths and clipping ranges, at which those of MiniLM are learned in some hundred steps of Adam;
#: rates that suit pretrained weights would leave them where they start.
BITS_LR, RANGE_LR = 0.02, 0.003

#: Settings of a session that say how it starts.
_START = {"allocation", "calibration_batches", "allocation_batches", "loss_fn", "seed", "inputs"}

#: Settings of a session whose state does not fit into the trainer's JSON file.
_TENSORS = ("ema_decay", "oscillation")

#: Settings by which optimizers of transformers bring groups of their own.
_OWN_GROUPS = {"params", "model", "optimizer_dict"}

#: File beside PEFT's adapters with the quantizers of the base model.
BASE_FILE = "nipq_quantizers.safetensors"


class NipqCallback(_library.TrainerCallback, _library.trainer_callback.ExportableState):  # type: ignore[misc, name-defined]  # known at run time only
    """Takes the trainer's model through search, freeze, fine-tune and finish; :func:`quantize` makes it.

    ``nipq/...`` goes to ``trainer.log`` whenever the trainer logs. The session is saved in ``trainer_state.json``. At
    the freeze the best metric starts anew: a checkpoint of the search is no candidate for the best quantized model.

    Attributes:
        session: the session, from the start of training on.
    """

    def __init__(self, trainer: Trainer, budget: Budget, settings: dict[str, Any]) -> None:
        self.session: QATSession | None = None
        self._trainer, self._budget, self._settings = trainer, budget, settings

    def on_train_begin(self, _args: Given, state: Given, _control: Given, **_: Given) -> None:
        """Build the session, and go on where the checkpoint was."""
        trainer = self._trainer
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        given = {"optimizer": optimizer, "loader": _TrainBatches(trainer), "schedule": None}
        settings = given | self._settings
        self.session = QATSession(trainer.model_wrapped, self._budget, state.max_steps, **settings)
        if state.global_step == 0:
            spread_seeds()
            return
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None or saved["attributes"]["session"] is None:
            raise OrderError(
                f"trainer: expected a checkpoint of a trainer that quantize() changed, found step {state.global_step} "
                "of another one. Start from its weights instead: load them before quantize()."
            )
        self.session.load_state_dict(saved["attributes"]["session"])

    def on_step_end(self, _args: Given, state: Given, control: Given, **_: Given) -> None:
        """Go on, if the optimizer did."""
        assert self.session is not None
        before = self.session.stage
        self.session.step()
        if self.session.stage != before:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if control.should_log:
            self._trainer.log(dict(self.session.logs()))

    def on_train_end(self, *_: Given, **__: Given) -> None:
        """However early training ended, the model is frozen within the budget."""
        assert self.session is not None
        self.session.finish()

    def state(self) -> dict[str, Any]:
        """State that the trainer writes into its state file."""
        return {"args": {}, "attributes": {"session": None if self.session is None else self.session.state_dict()}}


def quantize(
    trainer: Trainer,
    budget: Budget,
    *,
    config: Config | None = None,
    bits_lr: float = BITS_LR,
    range_lr: float = RANGE_LR,
    **settings: Given,
) -> NipqCallback:
    """Let a trainer do quantization-aware training: prepare, calibrate, allocate bits, and join its loop.

    Args:
        trainer: a ``transformers.Trainer`` that has not trained yet.
        budget: the limits.
        config: settings of ``nipq.prepare_``; a model that is prepared already is left as it is.
        bits_lr: peak learning rate of the bits; the trainer's schedule scales it.
        range_lr: peak learning rate of the clipping ranges.
        **settings: of :class:`nipq.QATSession`.

    Returns:
        The callback, with the session in it. Of a PEFT model the quantizers are saved beside its adapters.

    Raises:
        OrderError: if the trainer has such a callback, or wrapped the model, or its optimizer was built before.
        ConfigError: if an argument of the trainer does not go with it.
    """
    if unfit := [name for name in _TENSORS if settings.get(name) is not None]:
        raise ConfigError(
            f"quantize: expected settings whose state the trainer can save, found {unfit[0]}. Leave it out, or train "
            "in a loop of your own with nipq.QATSession."
        )
    callback = NipqCallback(trainer, budget, settings)
    check_alone([*trainer.callback_handler.callbacks, callback], NipqCallback)
    _check(trainer)
    model = trainer.model
    if not any(map(is_prepared, model.modules())):
        reader = BatchReader(model, settings.get("inputs"), "quantize")
        where, first = next(reader.read(settings.get("loader", _TrainBatches(trainer)), 1))
        prepare_(model, reader.inputs(first, where), config)
    if hasattr(model, "peft_config"):
        learn_quantizers_(model)  # get_peft_model stops all that is no adapter
    check_learned(model)
    if not is_calibrated(model):  # here, for it has to be done before FSDP shards the model
        own = {name: value for name, value in settings.items() if name in _START}
        calibrate_and_allocate_(model, settings.get("loader", _TrainBatches(trainer)), budget, **own)
    if trainer.optimizer is not None:
        check_optimizer(model, trainer.optimizer)
        drop_frozen_on_load_(trainer.optimizer, model)
    if hasattr(model, "peft_config"):
        _keep_base_(trainer)
    trainer.compute_loss = _with_penalty(trainer, callback)
    trainer.create_optimizer = _with_groups(trainer, bits_lr, range_lr)
    leave_bits_unclipped_(trainer.accelerator, lambda: callback.session)
    trainer.add_callback(callback)
    return callback


class _TrainBatches:
    """The trainer's training batches from the start, at each iteration, as many as are wanted."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        loader = self._trainer.get_train_dataloader()
        try:
            yield from loader
        except GeneratorExit:  # Accelerate counts a loader that is left midway as the running one
            getattr(loader, "end", lambda: None)()
            raise


def _check(trainer: Trainer) -> None:
    """Refuse what would go wrong later, and not say why."""
    if trainer.model_wrapped is not trainer.model:
        raise OrderError(
            f"{type(trainer.model).__name__}: expected a model that the trainer has not wrapped, found "
            f"{type(trainer.model_wrapped).__name__} around it. Call quantize(trainer, budget) before train()."
        )
    unfit = {
        "one GPU for each process": ("several (DataParallel)", trainer.args.n_gpu > 1, "Launch with torchrun"),
        "a model": ("model_init, which would make an unprepared one", trainer.model_init is not None, "Give model="),
        "torch's own engine": ("DeepSpeed", trainer.is_deepspeed_enabled, "Use DDP or FSDP2"),
        "restore_callback_states_from_checkpoint=False": (
            "True",
            trainer.args.restore_callback_states_from_checkpoint,
            "Leave it out: the session is restored without it",
        ),
    }
    for expected, (found, wrong, advice) in unfit.items():
        if wrong:
            raise ConfigError(f"trainer: expected {expected}, found {found}. {advice}.")


def _keep_base_(trainer: Trainer) -> None:
    """Let a trainer save and load quantizers and batch norms of the base model: PEFT saves the adapters alone."""
    save, load, load_best = trainer._save, trainer._load_from_checkpoint, trainer._load_best_model

    @wraps(save)
    def save_with_base(output_dir: str | None = None, *args: Given, **kwargs: Given) -> None:
        save(output_dir, *args, **kwargs)
        folder = Path(output_dir or trainer.args.output_dir)
        with written_whole(folder / BASE_FILE) as temporary:
            save_file({key: value.contiguous() for key, value in _base_state(trainer.model).items()}, temporary)

    @wraps(load)
    def load_with_base(checkpoint: str, model: Given = None) -> None:
        load(checkpoint, model)
        load_base(checkpoint, trainer.model if model is None else model)

    @wraps(load_best)
    def load_best_with_base() -> None:
        load_best()
        load_base(trainer.state.best_model_checkpoint, trainer.model)

    def load_base(checkpoint: str, model: nn.Module) -> None:
        path = Path(checkpoint) / BASE_FILE
        if not path.is_file():
            raise OrderError(
                f"{path}: expected the quantizers of the base model beside its adapters, found no such file. Resume "
                "from a checkpoint of a trainer that quantize() changed."
            )
        model.load_state_dict(load_file(path, device=str(trainer.args.device)), strict=False)

    trainer._save, trainer._load_from_checkpoint, trainer._load_best_model = (
        save_with_base, load_with_base, load_best_with_base
    )  # fmt: skip


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    """State of quantizers and batch norms, each tensor under its name in the model."""
    parts = (".parametrizations.weight.0.", ".quantization.", f".{PRODUCTS}.")
    norms = {name for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {
        key: value
        for key, value in model.state_dict().items()
        if any(part in f".{key}" for part in parts) or key.rpartition(".")[0] in norms
    }


def _with_penalty(trainer: Trainer, callback: NipqCallback) -> Callable[..., Any]:
    inner = trainer.compute_loss

    @wraps(inner)
    def compute_loss(
        model: nn.Module,
        inputs: Given,
        return_outputs: bool = False,
        num_items_in_batch: Given = None,
    ) -> Given:
        found = inner(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if callback.session is None or not model.training:
            return found
        term, parts = gradient_of(callback.session.penalty()), _undivided(trainer, num_items_in_batch)
        term = term if parts == 1 else term / parts  # two launches less in the usual step
        return (found[0] + term, found[1]) if return_outputs else found + term

    return compute_loss


def _undivided(trainer: Trainer, num_items: Given) -> int:
    """In how many micro-batches a loss comes that is one mean over all of them; other losses Trainer divides itself."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and num_items is not None) or trainer.compute_loss_func is not None
    return int(trainer.current_gradient_accumulation_steps) if scaled else 1


def _with_groups(trainer: Trainer, bits_lr: float, range_lr: float) -> Callable[..., Optimizer]:
    inner = trainer.create_optimizer

    @wraps(inner)
    def create_optimizer(*model: nn.Module | None) -> Given:  # older ones take none
        if trainer.optimizer is not None:
            return inner(*model)
        own = next((given for given in model if given is not None), trainer.model)
        kind, settings = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(trainer.args, own)
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or settings.keys() & _OWN_GROUPS:
            raise ConfigError(
                f"trainer: expected an optimizer that takes parameter groups, found {getattr(kind, '__name__', kind)}. "
                "Build it from nipq.param_groups(model, lr=...) and give it to Trainer as optimizers=(optimizer, None)."
            )
        groups = param_groups(own, settings["lr"], trainer.args.weight_decay, range_lr=range_lr, bits_lr=bits_lr)
        trainer.optimizer = kind(groups, **settings)
        return trainer.optimizer

    return create_optimizer
