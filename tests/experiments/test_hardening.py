"""Trials of damaged files and bad configs: a few of each kind; faults, crashes and hangs are counted as such."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from experiments.hardening import configs, files, page, trials
from experiments.hardening.trials import FAULT, REFUSED, RIGHT, Outcome
from nipq.errors import FileFormatError


def test_outcomes_of_every_kind_are_told_apart() -> None:
    def trial(seed: int) -> Outcome:
        if seed == 1:
            raise FileFormatError("model: expected a whole file, found half of one. Copy it again.")
        if seed == 2:
            raise KeyError("no")
        if seed == 3:
            os._exit(7)
        if seed == 4:
            time.sleep(60)
        if seed == 5:
            raise SystemExit(0)
        return RIGHT, ""

    found = dict(trials.outcomes(trial, range(7), limit=1.0))
    assert {seed: outcome for seed, (outcome, _) in found.items()} == {
        0: RIGHT, 1: REFUSED, 2: FAULT, 3: FAULT, 4: FAULT, 5: FAULT, 6: RIGHT,
    }  # fmt: skip
    assert found[2][1].startswith("KeyError: ")
    assert found[3][1] == "the process died with exit code 7"
    assert found[4][1].startswith("hangs")


@pytest.mark.parametrize("kind", ["packed", "npz"])
def test_damaged_files_are_right_or_refused(kind: str, tmp_path: Path) -> None:
    trial = files.trial_of(kind, files.Files(tmp_path, [kind]), tmp_path)
    found = [trials.judged(trial, seed) for seed in range(10, 50)]
    assert not [what for outcome, what in found if outcome == FAULT]
    assert sum(outcome == REFUSED for outcome, _ in found) > 30


def test_a_seed_gives_one_change_and_a_changed_file_is_signed_anew_or_not(tmp_path: Path) -> None:
    made = files.Files(tmp_path, ["packed"])
    changed = [files.changed("packed", made, seed) for seed in range(60)]
    assert changed == [files.changed("packed", made, seed) for seed in range(60)]
    assert len({data for data, _ in changed}) > 50
    assert 10 < sum(signed for _, signed in changed) < 40
    assert files.signed_anew(made.data["packed"]) == made.data["packed"]


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    trial = configs.trial_of(tmp_path)
    assert {trials.judged(trial, seed)[0] for seed in (0, 3, 8, 9, 10, 100, 101)} == {REFUSED}
    assert len({configs.bad_config(seed) for seed in range(configs.COUNT)}) > 0.85 * configs.COUNT


def test_batches_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(page, "RESULTS", tmp_path / "results.jsonl")
    counted = [trials.run("npz", lambda seed: (RIGHT if seed % 3 else REFUSED, ""), count, 4) for count in (4, 8, 8)]
    assert [dict(count) for count in counted] == [
        {RIGHT: 2, REFUSED: 2},
        {RIGHT: 5, REFUSED: 3},
        {RIGHT: 5, REFUSED: 3},
    ]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2
    text = page.section()
    assert text.startswith("**8 trials: 0 tracebacks, 0 hangs, 0 silent changes.**")
    assert "| NPZ files | 8 | 5 | 3 | 0 | 0 |" in text
    trials.forget(["npz"])
    assert (tmp_path / "results.jsonl").read_text() == ""
