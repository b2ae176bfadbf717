"""The README's own training loop on ten classes of small colour images: is it good for a user who changes nothing?

    python experiments/front_door/run.py GROUP [--seeds 0 1 2]   # names in settings.py
    python experiments/front_door/run.py --table                 # the tables of README.md, from results.jsonl

One run is one JSON line in ``results.jsonl``; a run that is there already is skipped. Float networks, one for each
seed, are trained when they are first needed and kept in ``runs/front_door``. Groups that choose between settings record
validation accuracy alone; test images are read by the groups that measure what was chosen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from colour_digits import Images, colour_digits, gray_digits, small_cnn
from settings import GROUPS, REPORTED, Setting
from tables import tables
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

import nipq
from nipq.prepare.layer_table import set_bits_, set_phase_
from nipq.qat.search import Search
from nipq.train.models import digits_net

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"
FLOATS = Path("runs/front_door")
BATCH, FLOAT_EPOCHS, FLOAT_LR = 64, 24, 0.05

#: Limits that nothing reaches, to ask for all costs.
EVERYTHING = nipq.AverageBits(weights=8, activations=8) & nipq.ModelSize("1 GB") & nipq.BitOps("1 T")

TASKS: dict[str, tuple[Callable[[], dict[str, Images]], Callable[[], nn.Module]]] = {
    "colour": (colour_digits, small_cnn),
    "digits": (gray_digits, digits_net),
}

Scores = dict[str, dict[str, float]]


class Loader:
    """Shuffled batches of a part, a new order at every pass, from a generator of its own."""

    def __init__(self, images: Images, seed: int) -> None:
        self.images = images
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Batches of a pass."""
        return len(self.images.inputs) // BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass."""
        order = torch.randperm(len(self.images.inputs), generator=self.generator)
        for chosen in order[: len(self) * BATCH].split(BATCH):
            yield self.images.inputs[chosen], self.images.targets[chosen]


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Accuracy in per cent, in evaluation mode."""
    training = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.inputs.split(500), images.targets.split(500), strict=True)
    )
    model.train(training)
    return 100 * right / len(images.targets)


def float_model(task: str, seed: int, images: Images) -> nn.Module:
    """The float network of a seed, trained once."""
    file = FLOATS / ("" if task == "colour" else task) / f"float-seed{seed}.pt"
    torch.manual_seed(seed)
    model = TASKS[task][1]()
    if file.is_file():
        model.load_state_dict(torch.load(file))
        return model
    loader = Loader(images, seed)
    steps = FLOAT_EPOCHS * len(loader)
    optimizer = SGD(model.parameters(), lr=FLOAT_LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = LambdaLR(optimizer, cosine(steps, warmup=0.1))
    for _ in range(FLOAT_EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


# ---------------------------------------------------------------------- schedules: factors on every learning rate


def cosine(steps: int, warmup: float = 0.0) -> Callable[[int], float]:
    """A linear warm-up from a tenth over a share of the steps, then half a cosine to 0."""

    def factor(step: int) -> float:
        first = warmup * steps
        if step < first:
            return 0.1 + 0.9 * step / first
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - first) / (steps - first)))

    return factor


def schedule_of(setting: Setting, steps: int, search: int) -> Callable[[int], float]:
    """The factor on the learning rates at each step.

    Args:
        setting: names the schedule.
        steps: of search and fine-tuning together.
        search: steps before the freeze.
    """

    def restart(step: int) -> float:
        """Half a cosine for the search; another one from ``setting.restart`` for the fine-tuning."""
        if step < search:
            return cosine(search)(step)
        return setting.restart * cosine(max(1, steps - search))(step - search)

    def search_only(step: int) -> float:
        """The full rate while searching, then half a cosine."""
        return 1.0 if step < search else cosine(max(1, steps - search))(step - search)

    return {
        "constant": lambda _: 1.0,
        "cosine": cosine(steps),
        "warm-up": cosine(steps, warmup=0.05),
        "restart": restart,
        "hold": search_only,
    }[setting.schedule]


# ---------------------------------------------------------------------- the method


def optimizer_of(model: nn.Module, setting: Setting) -> Optimizer:
    """The optimizer that a user would write, with the ratios of the setting."""
    groups = nipq.param_groups(
        model,
        lr=setting.lr,
        weight_decay=setting.weight_decay,
        range_lr=setting.range_ratio * setting.lr if setting.range_lr is None else setting.range_lr,
        bits_lr=setting.bits_ratio * setting.lr if setting.bits_lr is None else setting.bits_lr,
    )
    if setting.optimizer == "adam":
        return Adam(groups, lr=setting.lr)
    return SGD(groups, lr=setting.lr, momentum=0.9, nesterov=setting.nesterov)


def budget_of(model: nn.Module, setting: Setting) -> Any:  # noqa: ANN401
    """The budget; sizes and bit-operations as those of one bit-width everywhere."""
    if setting.budget == "average":
        return nipq.AverageBits(weights=setting.bits, activations=setting.bits)
    other = copy.deepcopy(model)
    set_bits_(other, {"*": int(setting.bits)})
    found = {cost.name: cost.rounded for cost in nipq.costs(other, EVERYTHING)}
    if setting.budget == "size":
        return nipq.ModelSize(math.ceil(found["model size"]))
    return nipq.BitOps(found["bit-operations"])


def trained(model: nn.Module, setting: Setting, loader: Loader, score: Callable[[str], None]) -> None:
    """The README's loop with a session."""
    nipq.prepare_(model, loader.images.inputs[:1])
    budget = budget_of(model, setting)
    optimizer = optimizer_of(model, setting)
    steps = setting.epochs * len(loader)
    session = nipq.QATSession(
        model, budget, steps, loader=loader, loss_fn=cross_entropy, optimizer=optimizer, finetune=setting.finetune,
        schedule=schedule_of(setting, steps, steps - round(setting.finetune * steps)), ramp=setting.ramp,
        allocation="noise" if setting.allocation == "noise" else None, calibration_batches=setting.calibration_batches,
        allocation_batches=setting.allocation_batches,
        on_state=lambda name: score("frozen") if name == "bn" else None,
    )  # fmt: skip
    model.train()
    for _ in range(setting.epochs):
        for x, y in loader:
            loss = cross_entropy(model(x), y) + session.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.step()
    session.finish()
    score("final")


def by_search(model: nn.Module, setting: Setting, loader: Loader, score: Callable[[str], None]) -> None:
    """The README's loop of before the session: search from the middle of the bits, one rate, no fine-tuning."""
    nipq.prepare_(model, loader.images.inputs[:1])
    nipq.calibrate_(model, loader)
    optimizer = optimizer_of(model, setting)
    budget = budget_of(model, setting)
    search = Search(model, budget=budget, total_steps=len(loader) * setting.epochs)
    model.train()
    for _ in range(setting.epochs):
        for x, y in loader:
            loss = cross_entropy(model(x), y) + search.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            search.step()
    nipq.freeze_bits_(model, search.budget)
    nipq.reestimate_bn_(model, loader)
    model.eval()
    score("final")


def untrained(model: nn.Module, setting: Setting, loader: Loader, score: Callable[[str], None]) -> None:
    """Calibration without training: one width everywhere, or bits by noise within the budget."""
    if setting.allocation == "noise":
        nipq.prepare_(model, loader.images.inputs[:1])
        budget = budget_of(model, setting)
        nipq.calibrate_(model, loader, setting.calibration_batches)
        nipq.allocate_bits_(model, loader, budget, cross_entropy, batches=setting.allocation_batches)
        nipq.freeze_bits_(model, budget)
        nipq.calibrate_(model, loader, setting.calibration_batches)
    else:
        bits = int(setting.bits)
        nipq.prepare_(model, loader.images.inputs[:1], nipq.Config(weight_bits=bits, activation_bits=bits))
        nipq.calibrate_(model, loader, setting.calibration_batches)
        nipq.freeze_bits_(model)
    set_phase_(model, "round")
    score("frozen")
    nipq.reestimate_bn_(model, loader)
    score("final")


def tuned_float(model: nn.Module, setting: Setting, loader: Loader, score: Callable[[str], None]) -> None:
    """Nothing but more training of the float network, for fairness: what the extra epochs give by themselves."""
    optimizer = SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=setting.weight_decay)
    schedule = LambdaLR(optimizer, cosine(setting.epochs * len(loader)))
    model.train()
    for _ in range(setting.epochs):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    score("final")


METHODS = {"session": trained, "search": by_search, "calibration": untrained, "float": tuned_float}


# ---------------------------------------------------------------------- runs


def run(setting: Setting, seed: int, data: dict[str, Images], parts: list[str]) -> dict[str, Any]:
    """One run: stage scores of one setting and seed."""
    model = float_model(setting.task, seed, data["train"])
    torch.manual_seed(1000 + seed)
    loader = Loader(data["train"], 1000 + seed)
    scores: Scores = {}

    def score(stage: str) -> None:
        scores[stage] = {part: accuracy(model, data[part]) for part in parts}

    score("float")
    started = time.perf_counter()
    METHODS[setting.method](model, setting, loader, score)
    seconds = time.perf_counter() - started
    found = None
    if setting.method != "float":
        found = {cost.name: float(cost.rounded) for cost in nipq.costs(model, EVERYTHING)}
    return {"scores": scores, "costs": found, "seconds": round(seconds, 1)}


def origin() -> dict[str, Any]:
    """Processor, and versions of packages."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "machine": {
            "processor": names[0] if names else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("nipq", "torch", "scikit-learn", "numpy")},
        },
    }


def records() -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.is_file() else []


def main() -> int:
    """Run a group, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="groups of settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the tables of what is in results.jsonl")
    given = parser.parse_args()
    if given.table:
        print(tables(records(), GROUPS, REPORTED))
        return 0
    torch.set_num_threads(1)
    data = {task: make() for task, (make, _) in TASKS.items()}
    for group in given.groups:
        parts = ["validation", "test"] if group in REPORTED else ["validation"]
        for seed in given.seeds:
            for name, setting in GROUPS[group].items():
                if any(
                    Setting(**r["setting"]) == setting and r["seed"] == seed and list(r["scores"]["float"]) == parts
                    for r in records()
                ):
                    continue
                record = {"group": group, "name": name, "seed": seed, "setting": asdict(setting)}
                record |= run(setting, seed, data[setting.task], parts)
                command = f"python experiments/front_door/run.py {shlex.quote(group)} --seeds {seed}"
                record |= {"command": command} | origin()
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                last = {part: round(score, 2) for part, score in record["scores"]["final"].items()}
                print(group, name, seed, last, record["seconds"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
