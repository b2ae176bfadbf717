"""Answers of commands: standard output holds the JSON object and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import nipq
from nipq.cli.output import answer
from nipq.cli.reporting import reporting
from nipq.errors import ConfigError

NOISY = """
import ctypes, os
from nipq.cli.output import answer
from nipq.cli.reporting import reporting
with reporting(True):
    ctypes.CDLL(None).puts(b"a solver")  # which C keeps in a buffer
    print("a factory")
    answer({"a": 1})
print("after")
"""


def test_standard_output_is_left_to_the_answer(capfd: pytest.CaptureFixture[str]) -> None:
    before = os.fstat(1)
    with reporting(True):
        os.write(1, b"a solver\n")
        print("a factory")
        answer({"a": 1})
    found = capfd.readouterr()
    assert json.loads(found.out) == {"ok": True, "a": 1}
    assert {"a solver", "a factory"} <= set(found.err.splitlines())
    assert os.path.samestat(os.fstat(1), before)


def test_an_error_is_an_answer_too(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reporting(True):
        raise ConfigError("no")
    assert json.loads(capfd.readouterr().out) == {"ok": False, "error": "ConfigError", "message": "no"}


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
@pytest.mark.parametrize("closed", ["", "2>&-"])
def test_a_real_process_answers_on_its_standard_output(closed: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(nipq.__file__).parents[1])}
    command = ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, NOISY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if closed:  # nowhere else to go
        assert '{"ok": true, "a": 1}' in done.stdout.splitlines()
    else:
        assert done.stdout == '{"ok": true, "a": 1}\nafter\n'
        assert sorted(done.stderr.splitlines()) == ["a factory", "a solver"]


def test_text_for_people_is_left_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    with reporting(False):
        print("text")
    assert capfd.readouterr().out == "text\n"
