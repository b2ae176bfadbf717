"""NIPQ in a Lightning trainer: prepare the model, add one callback.

::

    class Digits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nipq.prepare_(trained_network(), example_inputs)

        def configure_optimizers(self):
            return torch.optim.AdamW(nipq.param_groups(self, lr=1e-3, bits_lr=1e-2))
        ...

    trainer = pl.Trainer(callbacks=[NipqCallback(nipq.AverageBits(weights=4, activations=4))])
    trainer.fit(Digits(), loader)

``training_step`` stays as it is: for the time of ``fit`` the callback wraps it and adds the penalty to the loss that it
returns. It has to be there, as no hook may change a loss, and as DDP looks for unused parameters in what
``training_step`` returns. ``configure_gradient_clipping`` is wrapped, too, and does not see the bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import wraps
from typing import Any, TypeAlias

import torch

from nipq.budget.budget import Budget
from nipq.errors import ConfigError, OrderError
from nipq.integrations.shared import check_alone, gradient_of, spread_seeds, supported
from nipq.qat.session import QATSession

#: A ``Trainer``, a ``LightningModule``, and what the one hands to the other.
Given: TypeAlias = Any

#: State of the best score in callbacks that compare scores.
_SCORES = (
    "best_score", "wait_count", "best_model_score", "best_model_path", "best_k_models", "kth_best_model_path",
    "kth_value",
)  # fmt: skip

_NAMES = ("lightning.pytorch", "pytorch_lightning")
#: Under either name, but the same as the trainer's: the one that was imported first.
_library = supported(
    next((name for name in _NAMES if name in sys.modules), "pytorch_lightning"), least=(2, 6), extra="lightning"
)


class NipqCallback(_library.Callback):  # type: ignore[misc, name-defined]  # known at run time only
    """Takes the prepared module of a fit through search, freeze, fine-tune and finish.

    Steps are counted, saved, resumed and logged by themselves: ``nipq/...`` goes to the module's ``log_dict`` every
    ``log_every_n_steps``. Checkpoints hold the session and the state of torch's random numbers. A ``WeightAveraging``
    callback has to stand in front of this one; its model is frozen along. At the freeze ``EarlyStopping`` and
    ``ModelCheckpoint`` start anew: a score of the search is that of another model.

    Args:
        budget: the limits.
        total_steps: optimizer steps of the fit; the trainer's estimate if left out.
        module: name of the part of the Lightning module that is called with a batch's inputs to measure batch norms;
            the Lightning module itself if left out.
        loader: batches for that; the trainer's training loader if left out.
        **settings: of :class:`nipq.QATSession`.

    Attributes:
        session: the session, from the start of the fit on.
    """

    def __init__(
        self,
        budget: Budget,
        *,
        total_steps: int | None = None,
        module: str = "",
        loader: Iterable[Any] | None = None,
        **settings: Given,
    ) -> None:
        self.session: QATSession | None = None
        self._budget, self._total, self._module, self._loader, self._settings = (
            budget, total_steps, module, loader, settings
        )  # fmt: skip
        self._resumed: dict[str, Any] | None = None
        self._unscored: list[tuple[Given, dict[str, Any]]] = []

    def setup(self, trainer: Given, pl_module: Given, stage: str) -> None:
        """Check the trainer, and put the penalty into the loss."""
        if stage != "fit":
            return
        check_alone(trainer.callbacks, NipqCallback)
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"{type(pl_module).__name__}: expected automatic optimization, found manual. "
                "Use nipq.QATSession in training_step; it takes a list of optimizers."
            )
        later = trainer.callbacks[trainer.callbacks.index(self) :]
        if any(isinstance(other, _library.callbacks.WeightAveraging) for other in later):
            raise OrderError(
                "trainer: expected NipqCallback after WeightAveraging in callbacks, found it before. Exchange them: "
                "the averaged model has to be in place when batch norms are measured at the end."
            )
        self.session, self._resumed = None, None
        judges = (_library.callbacks.EarlyStopping, _library.callbacks.ModelCheckpoint)
        self._unscored = [
            (other, {name: value for name, value in deepcopy(other.state_dict()).items() if name in _SCORES})
            for other in trainer.callbacks
            if isinstance(other, judges)
        ]
        step, clip = pl_module.training_step, pl_module.configure_gradient_clipping

        @wraps(step)
        def with_penalty(*args: Given, **kwargs: Given) -> Given:
            assert self.session is not None
            return _plus(step(*args, **kwargs), gradient_of(self.session.penalty()))

        @wraps(clip)
        def clip_others(*args: Given, **kwargs: Given) -> None:
            assert self.session is not None
            kept = [(bit, bit.grad) for bit in self.session.learned_bits]
            for bit, _ in kept:
                bit.grad = None
            clip(*args, **kwargs)
            for bit, gradient in kept:
                bit.grad = gradient

        pl_module.training_step, pl_module.configure_gradient_clipping = with_penalty, clip_others

    def on_fit_start(self, trainer: Given, pl_module: Given) -> None:
        """Build the session: optimizers exist, the model is where it will be trained."""
        trainer.fit_loop.setup_data()  # the trainer has done so only where it had to count batches
        total = trainer.estimated_stepping_batches if self._total is None else self._total
        if not 0 < total < float("inf"):
            raise ConfigError(f"NipqCallback: expected a fit of known length, found {total} steps. Give total_steps=.")
        self.session = QATSession(
            pl_module.get_submodule(self._module),
            self._budget,
            int(total),
            optimizer=trainer.optimizers,
            loader=trainer.train_dataloader if self._loader is None else self._loader,
            **_settings(self._settings),
        )
        for other in trainer.callbacks:
            if isinstance(other, _library.callbacks.WeightAveraging):
                self.session.follow(other._average_model)
        if self._resumed is not None:
            self.session.load_state_dict(self._resumed["session"])

    def on_train_start(self, trainer: Given, *_: Given) -> None:
        """Random numbers of the checkpoint, or of this rank."""
        if self._resumed is None:
            spread_seeds()
            return
        torch.set_rng_state(self._resumed["rng"].cpu())
        if self._resumed["cuda_rng"] is not None:
            torch.cuda.set_rng_state(self._resumed["cuda_rng"].cpu())
        spread_seeds(trainer.global_step)  # a checkpoint has the numbers of rank 0 alone
        fetcher = trainer.fit_loop._data_fetcher
        if not any(hasattr(loader, "load_state_dict") for loader in fetcher.combined_loader.flattened):
            iter(fetcher)  # draws again what was drawn before the numbers were put back: the order of the data

    def on_train_batch_end(self, trainer: Given, *_: Given) -> None:
        """Go on, if the optimizer did."""
        assert self.session is not None
        before = self.session.stage
        self.session.step()
        if self.session.stage != before:
            for other, fresh in self._unscored:
                other.load_state_dict(other.state_dict() | deepcopy(fresh))
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            self.log_dict(self.session.logs())

    def on_train_end(self, *_: Given) -> None:
        """However early training ended, the model is frozen within the budget."""
        assert self.session is not None
        self.session.finish()

    def on_fit_end(self, *_: Given) -> None:
        """The same where nothing was left to train: a fit resumed after its last step has no end of training."""
        self.on_train_end()

    def teardown(self, _trainer: Given, pl_module: Given, **_: Given) -> None:
        """Give the module's methods back."""
        _give_back(pl_module)

    def on_exception(self, _trainer: Given, pl_module: Given, *_: Given) -> None:
        """Give the module's methods back, and let go of the optimizers."""
        _give_back(pl_module)
        if self.session is not None:
            self.session.close()

    def state_dict(self) -> dict[str, Any]:
        """QATSession and random numbers, for the trainer's checkpoint."""
        if self.session is None:
            return {}
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return {"session": self.session.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the trainer's checkpoint; most strategies load it before ``on_fit_start``, some after."""
        self._resumed = state_dict or None
        if self.session is not None and self._resumed is not None:
            self.session.load_state_dict(self._resumed["session"])


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a session whose learning rates are the trainer's."""
    return {"schedule": None} | given


def _give_back(pl_module: Given) -> None:
    for name in ("training_step", "configure_gradient_clipping"):
        pl_module.__dict__.pop(name, None)


def _plus(output: Given, term: torch.Tensor) -> Given:
    """The output of ``training_step`` with the penalty in its loss."""
    if output is None:
        return None
    return {**output, "loss": output["loss"] + term} if isinstance(output, Mapping) else output + term
