"""Settings that are compared: the one of the README first, then all that differ from it by a field or two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Setting:
    """One way of quantizing the float network.

    Attributes:
        method: the loop with a session; the loop of before, with a search alone; no training; float training alone.
        bits: budget, as an average or as the cost of this width everywhere.
        budget: its kind.
        optimizer: of the user.
        lr: learning rate of the weights.
        range_ratio: learning rate of clipping ranges in units of the weights'.
        bits_ratio: learning rate of bit-widths in units of the weights'.
        range_lr: learning rate of clipping ranges, whatever the weights'.
        bits_lr: learning rate of bit-widths, whatever the weights'.
        weight_decay: of the weights.
        nesterov: of SGD.
        schedule: shape of all learning rates over the steps.
        restart: factor on the learning rates with which fine-tuning starts anew.
        epochs: of search and fine-tuning together.
        finetune: share of them with rounding and frozen bits.
        allocation: first bits by noise within the budget, or none: the middle of their range.
        calibration_batches: batches of 64 for the ranges.
        allocation_batches: batches of 64 for the first bits.
        ramp: share of the search in which the budget is approached, from where bits start.
        task: colour images and a small CNN, or the gray digits and the separable network of ``nipq demo``.
    """

    method: Literal["session", "search", "calibration", "float"] = "session"
    bits: float = 4
    budget: Literal["average", "size", "bops"] = "average"
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.02
    range_ratio: float = 1.0
    bits_ratio: float = 1.0
    range_lr: float | None = None
    bits_lr: float | None = None
    weight_decay: float = 0.0
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "warm-up", "restart", "hold"] = "cosine"
    restart: float = 0.25
    epochs: int = 5
    finetune: float = 0.3
    allocation: Literal["noise", "none"] = "noise"
    calibration_batches: int = 8
    allocation_batches: int = 32
    ramp: float = 0.5
    task: Literal["colour", "digits"] = "colour"


#: Where the exploration stood, and what came out of it.
BASE = Setting()
CHOSEN = replace(BASE, finetune=0.5)
#: The README's loop of before.
OLD = Setting(method="search", lr=0.04, weight_decay=1e-5, nesterov=True, schedule="constant", allocation="none")

GROUPS: dict[str, dict[str, Setting]] = {
    "today": {
        "calibration, one width": Setting(method="calibration", allocation="none"),
        "calibration, bits by noise": Setting(method="calibration"),
        "search alone, 5 epochs": OLD,
    },
    "today, other lengths": {
        "search alone, 3 epochs": replace(OLD, epochs=3),
        "search alone, 8 epochs": replace(OLD, epochs=8),
    },
    "rate and schedule": {
        f"{bits}/{bits}, {schedule}, lr {lr}": replace(BASE, bits=bits, schedule=schedule, lr=lr)
        for bits, schedule, lr in (
            (4, "cosine", 0.02),
            (3, "cosine", 0.02),
            (4, "cosine", 0.005),
            (3, "cosine", 0.005),
            (3, "constant", 0.02),
            (3, "restart", 0.02),
            (3, "cosine", 0.04),
            (3, "hold", 0.02),
            (3, "warm-up", 0.02),
            (3, "cosine", 0.01),
            (4, "constant", 0.02),
            (4, "cosine", 0.04),
        )
    },
    "share of fine-tuning": {f"3/3, {share}": replace(BASE, bits=3, finetune=share) for share in (0.5, 0.75, 0.2)},
    "bits and ranges": {
        "3/3, bits 0, frozen allocation": replace(BASE, bits=3, bits_ratio=0.0),
        "3/3, bits x 0.1": replace(BASE, bits=3, bits_ratio=0.1),
        "3/3, bits x 10": replace(BASE, bits=3, bits_ratio=10.0),
        "3/3, ranges x 0.1": replace(BASE, bits=3, range_ratio=0.1),
        "3/3, ranges x 10": replace(BASE, bits=3, range_ratio=10.0),
        "3/3, no allocation": replace(BASE, bits=3, allocation="none"),
    },
    "4/4, three seeds": {
        f"4/4, lr {lr}, share {share}": replace(BASE, lr=lr, finetune=share)
        for lr, share in ((0.01, 0.3), (0.01, 0.5), (0.02, 0.3))
    },
    "decay and more training": {
        "float network, trained on at lr 0.02": Setting(method="float", lr=0.02),
        "4/4, weight decay 5e-4": replace(CHOSEN, weight_decay=5e-4),
    },
    "Adam": {
        "3/3, Adam 1e-3, all x 1": replace(CHOSEN, bits=3, optimizer="adam", lr=1e-3),
        "3/3, Adam 1e-3, ranges x 3, bits x 20": replace(
            CHOSEN, bits=3, optimizer="adam", lr=1e-3, range_ratio=3.0, bits_ratio=20.0
        ),
        "3/3, Adam 3e-4, all x 1": replace(CHOSEN, bits=3, optimizer="adam", lr=3e-4),
        "3/3, Adam 3e-4, ranges x 3, bits x 20": replace(
            CHOSEN, bits=3, optimizer="adam", lr=3e-4, range_ratio=3.0, bits_ratio=20.0
        ),
        "3/3, Adam 3e-4, ranges 3e-3, bits 2e-2": replace(
            CHOSEN, bits=3, optimizer="adam", lr=3e-4, range_lr=3e-3, bits_lr=2e-2
        ),
        "3/3, Adam 3e-3, all x 1": replace(CHOSEN, bits=3, optimizer="adam", lr=3e-3),
    },
    "around the choice": {
        "4/4, no allocation": replace(CHOSEN, allocation="none"),
        "3/3, no allocation": replace(CHOSEN, bits=3, allocation="none"),
        "model size of 3 bits": replace(CHOSEN, bits=3, budget="size"),
        "bit-operations of 3 bits": replace(CHOSEN, bits=3, budget="bops"),
        "3/3, 3 epochs": replace(CHOSEN, bits=3, epochs=3),
        "3/3, 8 epochs": replace(CHOSEN, bits=3, epochs=8),
        "4/4, lr 0.1": replace(CHOSEN, lr=0.1),
        "4/4, lr 0.001": replace(CHOSEN, lr=0.001),
        "3/3, allocation from 8 batches": replace(CHOSEN, bits=3, allocation_batches=8),
    },
    "gray digits": {
        f"{bits}/{bits}, {epochs} epochs": replace(CHOSEN, task="digits", bits=bits, epochs=epochs)
        for bits in (4, 3)
        for epochs in (5, 20)
    }
    | {
        "4/4, calibration, one width": Setting(method="calibration", allocation="none", task="digits"),
        "3/3, calibration, one width": Setting(method="calibration", allocation="none", task="digits", bits=3),
        "4/4, Adam 1e-3, 20 epochs": replace(CHOSEN, task="digits", optimizer="adam", lr=1e-3, epochs=20),
    },
    "final": {
        "4/4, session": CHOSEN,
        "3/3, session": replace(CHOSEN, bits=3),
        "3/3, calibration, one width": Setting(method="calibration", allocation="none", bits=3),
        "3/3, calibration, bits by noise": Setting(method="calibration", bits=3),
    },
}

#: Groups that measure what was chosen: they read test images.
REPORTED = ("today", "today, other lengths", "final")
