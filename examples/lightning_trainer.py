"""Lightning: a prepared model in the module, one callback in the trainer.

python examples/lightning_trainer.py        # pip install "nipq[lightning]"
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from digits import accuracy, data, loader, trained_network
from torch import Tensor
from torch.nn.functional import cross_entropy

import nipq
from nipq.integrations.lightning import NipqCallback


class Digits(pl.LightningModule):
    """As it was for floats, but for two calls in ``__init__`` and the groups of the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained_network(train)
        nipq.prepare_(self.network, train.tensors[0][:1])

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(nipq.param_groups(self, lr=1e-3, weight_decay=1e-2, bits_lr=0.05))


pl.seed_everything(0, verbose=False)
train, test = data()
model = Digits()
callback = NipqCallback(nipq.AverageBits(weights=3, activations=3), loss_fn=cross_entropy)
trainer = pl.Trainer(
    accelerator="cpu", max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=5.0,
)  # fmt: skip
trainer.fit(model, loader(train))
print(callback.session.logs())
print(f"quantized: {accuracy(model, test):.3f}")
