"""A loop of your own: gradient accumulation, clipping, a learning-rate schedule, an average of weights, a checkpoint.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from digits import accuracy, data, loader, trained_network
from torch import nn
from torch.nn.functional import cross_entropy

import nipq
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import without_bits

EPOCHS, ACCUMULATE = 6, 2

torch.manual_seed(0)
train, test = data()
model = trained_network(train)
print(f"float: {accuracy(model, test):.3f}")

nipq.prepare_(model, train.tensors[0][:1])
optimizer = torch.optim.AdamW(nipq.param_groups(model, lr=1e-3, weight_decay=1e-2, bits_lr=0.05))
total = EPOCHS * len(loader(train)) // ACCUMULATE
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
budget = nipq.AverageBits(weights=3, activations=3)
session = nipq.QATSession(
    model, budget, total, loader=loader(train), loss_fn=cross_entropy, optimizer=optimizer, schedule=None
)
average = WeightAverage(model, decay=0.9)

model.train()
for epoch in range(EPOCHS):
    for batch, (x, y) in enumerate(loader(train), start=1):
        loss = cross_entropy(model(x), y) + session.penalty()
        (loss / ACCUMULATE).backward()
        if batch % ACCUMULATE:
            continue
        nn.utils.clip_grad_norm_(without_bits(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        session.step()
        average.update(model)
    print(epoch + 1, session.stage, session.logs())
    checkpoint = {
        part: thing.state_dict()
        for part, thing in {"model": model, "optimizer": optimizer, "schedule": schedule, "session": session}.items()
    }  # load them in this order

average.copy_to_(model)
session.finish()
print(f"quantized: {accuracy(model, test):.3f}")
print(nipq.summary(model))
