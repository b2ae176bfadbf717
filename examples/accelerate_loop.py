"""Accelerate: the loop of its documentation, one object more.

python examples/accelerate_loop.py        # pip install "nipq[accelerate]"
torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, data, loader, trained_network
from torch.nn.functional import cross_entropy

import nipq
from nipq.integrations.accelerate import AcceleratedSession

EPOCHS, ACCUMULATE = 8, 2

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
set_seed(0)
train, test = data()
model = trained_network(train)
nipq.prepare_(model, train.tensors[0][:1])
optimizer = torch.optim.AdamW(nipq.param_groups(model, lr=1e-3, weight_decay=1e-2, bits_lr=0.05))

model, optimizer, batches = accelerator.prepare(model, optimizer, loader(train))
total = EPOCHS * -(-len(batches) // ACCUMULATE)
budget = nipq.AverageBits(weights=3, activations=3)
session = AcceleratedSession(
    accelerator, model, budget, total, optimizer=optimizer, loader=loader(train), loss_fn=cross_entropy
)

model.train()
for _ in range(EPOCHS):
    for x, y in batches:
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(x), y) + session.penalty())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    accelerator.print(session.stage, session.logs())
session.finish()
accelerator.print(f"quantized: {accuracy(accelerator.unwrap_model(model), test):.3f}")
