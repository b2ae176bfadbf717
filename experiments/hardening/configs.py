"""Bad configs: 300 of them are read, and a run is set up where one is accepted; each is refused by name, or sound.

    python -m experiments.hardening.configs              # goes on where it stopped
    python -m experiments.hardening.configs --seed 17    # one trial with its traceback
    python -m experiments.hardening.configs --anew       # discards earlier counts

A config is a committed one with a value of another type or size, a field removed, renamed or repeated, text that is no
YAML or more than one should read, or a factory that fails in one of the ways in which user code does. One that is
accepted must be a config as the documents have it, from which data, model, budget and optimizer are made without an
error: nothing trains here.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from torch import Tensor, nn

from experiments.hardening.trials import REFUSED, RIGHT, Outcome, Trial, forget, parser, run
from nipq.errors import ConfigError
from nipq.train.config import check_config, load_config
from nipq.train.parallel import accelerated
from nipq.train.trainer import Trainer

#: Trials, and trials in a line of the results.
COUNT, BATCH = 300, 50
#: Seconds for one of them.
LIMIT = 30.0

BASE: dict[str, Any] = {
    "model": {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}},
    "data": {"kind": "digits", "batch_size": 64, "validation": 0.1, "train_limit": 128},
    "quantization": {"weight_bits": {"min": 2, "max": 8}, "rules": [{"pattern": "stem", "quantize": True}]},
    "budget": {"average_bits": {"weights": 4.0, "activations": 4.0}},
    "stages": {"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 1, "lr": 0.01}},
    "optimizer": {"lr": 0.05, "weight_decay": 0.0005, "warmup_epochs": 1, "final": 0.01},
    "batchnorm_batches": 1,
    "calibration_batches": 1,
    "verify_batches": 1,
    "device": "cpu",
    "threads": 1,
    "seed": 0,
}

#: Values for any field.
BAD: tuple[Any, ...] = (
    None, True, -1, 0, 0.5, 1.5, 10**20, 2**40, -(2**63), 1e300, float("inf"), float("-inf"), float("nan"), "", "x",
    "1e3", "\u00e9\u0000", "../..", "/", "os:system", [], [1, 2], ["x"], {}, {"x": 1}, {"min": 8, "max": 2}, [[[]]],
)  # fmt: skip

#: Lists of lists, 9^7 entries when they are written out.
BOMB = "\n".join(
    f"{name}: &{name} [{', '.join(9 * [inner])}]"
    for name, inner in zip("abcdefg", ("x", *(f"*{n}" for n in "abcdef")), strict=True)
)

_REST = yaml.safe_dump({key: value for key, value in BASE.items() if key != "model"})

#: Texts instead of a config.
TEXTS = (
    "", "[]", "1", "model", "model: [", "\tmodel: x", "%", "--- a\n--- b", "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system", "model: *none", "&a [*a]", "model: &m {factory: *m}", "? [a]\n: b", "\ufeff[]",
    "model: {factory: resnet18}\nmodel: {factory: resnet18}", "{" * 5000, "[" * 100_000, "a: " * 2000, "\x00",
    "\x07: 1",
    f"{BOMB}\nmodel: {{factory: resnet18, kwargs: {{x: *g}}}}",
    f"{_REST}model:\n  factory: nipq.train.models:digits_net\n  kwargs:\n{indent(BOMB, '    ')}",
    "seed: 0x" + "f" * 4000, "seed: " + "9" * 5000, "seed: 190:20:30", "data: {kind: digits, <<: {x: 1}}",
    "seed: 2001-12-14",
)  # fmt: skip


# ---------------------------------------------------------------------- factories of models, good and bad


class Broken(nn.Module):
    """A network whose forward raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Raise an error of the user's."""
        raise KeyError(f"an error of the user's forward, shape {x.shape}")


def raising(**_settings: Any) -> nn.Module:  # noqa: ANN401 - any
    """A factory that fails."""
    raise ZeroDivisionError("an error of the user's factory")


def leaving(**_settings: Any) -> nn.Module:  # noqa: ANN401 - any
    """A factory that ends the process, with status 0."""
    sys.exit(0)


def interrupted(**_settings: Any) -> nn.Module:  # noqa: ANN401 - any
    """A factory that raises what is no ``Exception``."""
    raise GeneratorExit


def nothing(**_settings: Any) -> None:  # noqa: ANN401 - any
    """A factory that forgot to return."""


#: Factories that user code can be; the first one is good.
FACTORIES = (
    "nipq.train.models:digits_net", *(f"{__name__}:{name}" for name in ("Broken", "raising", "leaving", "interrupted",
    "nothing", "none_such", "BASE")), "json:loads", "no.such.module:f", "a b:c", ":", "x:", ":x", "nipq:", "resnet",
)  # fmt: skip


def bad_config(seed: int) -> str:
    """The text of a config that something is wrong with.

    Args:
        seed: of the trial.
    """
    draw = random.Random(seed)
    if seed < len(TEXTS):
        return TEXTS[seed]
    tree = yaml.safe_load(yaml.safe_dump(BASE))
    if seed < len(TEXTS) + len(FACTORIES):
        tree["model"]["factory"] = FACTORIES[seed - len(TEXTS)]
        return yaml.safe_dump(tree)
    for _ in range(draw.choice([1, 1, 2])):
        section = tree
        while isinstance(section, dict) and draw.random() < 0.6:
            inner = [value for value in section.values() if isinstance(value, dict) and value]
            if not inner:
                break
            section = draw.choice(inner)
        key = draw.choice(list(section) or ["x"])
        match draw.randrange(8):
            case 0:
                section.pop(key, None)
            case 1:
                section[f"{key}s"] = section.pop(key, 1)
            case 2:
                return yaml.safe_dump(tree).replace(f"{key}:", f"{key}: 1\n{key}:", 1)
            case _:
                section[key] = draw.choice(BAD)
    return yaml.safe_dump(tree, allow_unicode=True)


def trial_of(folder: Path) -> Trial:
    """A trial: read a bad config, and set up the run if it is accepted.

    Args:
        folder: for the file.
    """
    path = folder / "config.yaml"

    def trial(seed: int) -> Outcome:
        path.write_bytes(bad_config(seed).encode("utf-8", "surrogatepass"))
        try:
            config = load_config(path)
        except ConfigError:
            return REFUSED, ""
        with accelerated(config) as accelerator:
            Trainer(config, None, accelerator)
        assert check_config(config.model_dump(mode="json")) == config, "it is another one when it is written and read"
        return RIGHT, ""

    return trial


def main() -> None:
    """Run all trials, or one."""
    arguments = parser(__doc__, ["config"]).parse_args()
    if arguments.anew:
        forget(["config"])
    with tempfile.TemporaryDirectory() as name:
        trial = trial_of(Path(name))
        if arguments.seed is not None:
            print(bad_config(arguments.seed)[:2000])
            print(trial(arguments.seed))
        else:
            print(f"config: {dict(run('config', trial, COUNT, BATCH, LIMIT))}")


if __name__ == "__main__":
    main()
