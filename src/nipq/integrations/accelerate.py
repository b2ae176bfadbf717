"""NIPQ in a loop around an ``Accelerator``: one object, after ``accelerator.prepare``.

::

    nipq.prepare_(model, example_inputs)
    optimizer = torch.optim.AdamW(nipq.param_groups(model, lr=1e-3, bits_lr=1e-2))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    session = AcceleratedSession(accelerator, model, budget, total_steps, optimizer=optimizer, loader=samples)
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(criterion(model(x), y) + session.penalty())
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    session.finish()

``accelerator.save_state`` and ``load_state`` take the session along, across the freeze, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nipq.budget.budget import Budget
from nipq.errors import ConfigError, OrderError
from nipq.integrations.shared import leave_bits_unclipped_, spread_seeds, supported
from nipq.qat.session import QATSession

_library = supported("accelerate", least=(1, 1), extra="accelerate")

#: Engines that hold parameters in a form of their own.
_ENGINES = ("DEEPSPEED", "MEGATRON_LM")


class AcceleratedSession(QATSession):
    """A :class:`nipq.QATSession` that knows an ``Accelerator``: its wrapped optimizers, its checkpoints, its trackers.

    :meth:`step` may be called in every micro-batch. Mixed precision and accumulation need nothing further. From here on
    ``accelerator.clip_grad_norm_`` leaves bits out, except under FSDP; see :func:`nipq.qat.optim.without_bits`.

    Args:
        accelerator: the accelerator.
        model: the model that it prepared.
        budget: the limits.
        total_steps: optimizer steps of search and fine-tuning together, not micro-batches.
        optimizer: the optimizer that it prepared, or all of them.
        **settings: of :class:`nipq.QATSession`; among them the ``loader`` for calibration, the
            first bits and batch norms, and ``schedule``, which is None here.

    Raises:
        OrderError: if the accelerator has a session already, or model or optimizer came before ``nipq.prepare_``.
        ConfigError: if the engine behind it is not supported.
    """

    def __init__(
        self,
        accelerator: Any,  # noqa: ANN401  (no types without the package)
        model: nn.Module,
        budget: Budget,
        total_steps: int,
        *,
        optimizer: Optimizer | Sequence[Optimizer],
        **settings: Any,  # noqa: ANN401
    ) -> None:
        engine = getattr(accelerator.distributed_type, "name", str(accelerator.distributed_type))
        if engine in _ENGINES:
            raise ConfigError(
                f"accelerator: expected torch's own engine (DDP or FSDP2), found {engine}. Use one of them."
            )
        if any(isinstance(other, QATSession) for other in accelerator._custom_objects):
            raise OrderError(
                "accelerator: expected one session, found a second one. Go on with the first, or use a new Accelerator."
            )
        given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        own = [getattr(one, "optimizer", one) for one in given]  # steps of its wrapper are not always steps
        super().__init__(model, budget, total_steps, optimizer=own, **({"schedule": None} | settings))
        self._accelerator = accelerator
        accelerator.register_for_checkpointing(self)
        leave_bits_unclipped_(accelerator, lambda: self)
        spread_seeds()

    def log(self) -> None:
        """Send :meth:`logs` to the accelerator's trackers."""
        self._accelerator.log(self.logs(), step=self.steps)
