"""Trials in processes of their own: each ends right, refused, or as a fault; a crash or a hang costs one trial.

A batch of seeds is one line of ``results.jsonl``. A script that is started again goes on with the batches that are not
there yet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import origin
from experiments.shown import ROOT, lines_of
from nipq.errors import NipqError, first_line

RESULTS = Path(__file__).parent / "results.jsonl"

#: Outcomes: the same numbers bit for bit; one of nipq's own errors, or a check that fails; another model, from a file
#: that was changed on purpose and given its new checksum; anything else.
RIGHT, REFUSED, SIGNED, FAULT = "right", "refused", "signed anew", "fault"

#: Seconds after which a trial counts as hanging, and bytes that its process may take.
LIMIT, MEMORY = 120.0, 12 * 2**30

#: Outcome of one trial and, for a fault, what happened.
Outcome = tuple[str, str]
Trial = Callable[[int], Outcome]


def judged(trial: Trial, seed: int) -> Outcome:
    """Run a trial here, where nipq's own errors count as refusals and all others as faults.

    Args:
        trial: from a seed to an outcome.
        seed: of this trial.
    """
    try:
        return trial(seed)
    except NipqError as error:
        if len(str(error)) > 20 and str(error)[-1:] != ":":
            return REFUSED, ""
        return FAULT, f"a message without a remedy: {error}"
    except BaseException as error:  # whatever it is, it is counted
        place = traceback.extract_tb(error.__traceback__)[-1]
        return FAULT, f"{type(error).__name__}: {first_line(error)[:200]} ({Path(place.filename).name}:{place.lineno})"


def _work(trial: Trial, seeds: Sequence[int], answers: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ libraries say about damaged files
    for seed in seeds:
        answers.send(judged(trial, seed))
    answers.close()


def outcomes(trial: Trial, seeds: Sequence[int], limit: float = LIMIT) -> Iterator[tuple[int, Outcome]]:
    """Run trials in a forked process, and in a new one after a crash or a hang.

    Args:
        trial: from a seed to an outcome.
        seeds: one for each trial.
        limit: seconds for each.

    Yields:
        Seed and outcome.
    """
    context, left = multiprocessing.get_context("fork"), list(seeds)
    while left:
        answers, end = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(trial, left, end))
        process.start()
        end.close()
        while left:
            try:
                found = answers.recv() if answers.poll(limit) else (FAULT, f"hangs: no answer in {limit:g} s")
            except EOFError:
                process.join()
                found = FAULT, f"the process died with exit code {process.exitcode}"
            yield left.pop(0), found
            if found[1].startswith(("hangs", "the process died")):
                break
        process.kill()
        process.join()
        answers.close()


def run(kind: str, trial: Trial, count: int, batch: int, limit: float = LIMIT) -> Counter[str]:
    """Run the batches of a kind that have no line yet, and print what was counted.

    Args:
        kind: name of the kind of trials.
        trial: from a seed to an outcome.
        count: how many seeds, from 0.
        batch: seeds in a line of the results.
        limit: seconds for each trial.

    Returns:
        How often each outcome was found, earlier batches included.
    """
    torch.set_num_threads(1)
    done = [line for line in lines_of(RESULTS) if line["kind"] == kind]
    for first in range(0, count, batch):
        seeds = range(first, min(first + batch, count))
        if any((line["first"], line["last"]) == (seeds[0], seeds[-1]) for line in done):
            continue
        started = time.perf_counter()
        found = dict(outcomes(trial, seeds, limit))
        counts = Counter(outcome for outcome, _ in found.values())
        faults = [
            {"seed": seed, "what": _portable(what)} for seed, (outcome, what) in found.items() if outcome == FAULT
        ]
        record = {
            "kind": kind, "first": seeds[0], "last": seeds[-1], "counts": dict(counts), "faults": faults,
            "seconds": round(time.perf_counter() - started, 1), **_origin(),
        }  # fmt: skip
        append(record)
        done.append(record)
        print(f"{kind} {seeds[0]}..{seeds[-1]}: {dict(counts)}, {record['seconds']:.0f} s", flush=True)
        for fault in faults:
            print(f"  seed {fault['seed']}: {fault['what']}", flush=True)
    total: Counter[str] = Counter()
    for line in done:
        total.update(line["counts"])
    return total


def append(record: dict[str, Any]) -> None:
    """Add a line to the results.

    Args:
        record: plain numbers, strings, lists and dictionaries.
    """
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def parser(text: str | None, kinds: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the scripts have.

    Args:
        text: docstring of the script.
        kinds: that it can run.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--kinds", nargs="+", choices=kinds, default=list(kinds), help="default: all")
    found.add_argument("--anew", action="store_true", help="discard earlier counts of these kinds")
    found.add_argument("--seed", type=int, help="run one trial here, with its traceback, and count nothing")
    return found


def forget(kinds: Sequence[str]) -> None:
    """Remove the lines of some kinds from the results.

    Args:
        kinds: their names.
    """
    lines = [line for line in lines_of(RESULTS) if line["kind"] not in kinds]
    RESULTS.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _origin() -> dict[str, Any]:
    found = origin()
    found["machine"].pop("load_before")
    return found | {"command": found["command"].replace("-m benchmarks.", "-m experiments.hardening.")}


def _portable(text: str) -> str:
    """A message without paths of this machine."""
    return re.sub(r"(/[\w.+-]+)+/", "", text.replace(f"{ROOT}/", ""))
