"""What a stage trains with: phases, tempering, oscillations, uniform bits, and groups with settings of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nipq.train.passage import calibrate
from nipq.train.schedule import tempering_share

from nipq.budget.budget import costs
from nipq.config import Phase
from nipq.errors import ConfigError
from nipq.prepare.layer_table import quantizers
from nipq.train import passage, stage
from nipq.train.checkpoint import Checkpoint
from nipq.train.config import TrainConfig
from nipq.train.pipeline import run
from nipq.train.run_folder import RunFolder
from nipq.train.trainer import Trainer

Make = Callable[..., TrainConfig]
Until = Callable[[Trainer, str], Trainer]
SHORT = {"float": {"epochs": 1}, "search": {"epochs": 1}, "finetune": {"epochs": 1, "lr": 0.01}}
DATA = {"kind": "digits", "batch_size": 32, "train_limit": 128}


@pytest.mark.parametrize(("phase", "noisy"), [("noise", True), ("round", False)])
def test_finetune_trains_in_the_phase_asked_for(phase: str, noisy: bool, make_config: Make, until: Until) -> None:
    stages = {**SHORT, "finetune": {"epochs": 1, "phase": phase}}
    trainer = until(Trainer(make_config(stages=stages, data=DATA)), "finetune")
    found = quantizers(trainer.model)
    assert all(q.is_frozen for q in found)
    assert {q.phase for q in found} == {Phase.NOISE if noisy else Phase.ROUND}
    before = [q.alpha_raw.detach().clone() for q in found]
    images, _ = next(trainer.batches())
    first, second = (trainer.model(images) for _ in range(2))
    assert torch.equal(first, second) is not noisy
    trainer.step(*next(trainer.batches()))
    assert any(not torch.equal(q.alpha_raw, old) for q, old in zip(found, before, strict=True))
    assert {q.phase for q in quantizers(until(trainer, "done").model)} == {Phase.ROUND}


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_tempering_ends_at_the_true_error(
    kind: str, make_config: Make, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    temper = stage.temper_
    monkeypatch.setattr(stage, "temper_", lambda model, share: (shares.append(share), temper(model, share)))
    stages = {**SHORT, "search": {"epochs": 2}, "finetune": {"epochs": 1, "phase": "noise"}}
    trainer = until(Trainer(make_config(stages=stages, data=DATA, tempering=kind)), "search")
    shares.clear()
    for _ in range(2):
        for batch in trainer.batches():
            trainer.step(*batch)
        trainer.progress.epoch, trainer.progress.step = trainer.progress.epoch + 1, 0
    assert shares == [tempering_share(kind, step, 8) for step in range(8)]  # type: ignore[arg-type]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    trainer.advance()
    assert all(float(q.error_share) == 1 for q in quantizers(trainer.model) if q.error_share is not None)


def test_shapes_of_the_share() -> None:
    assert [tempering_share("linear", step, 5) for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert tempering_share("cosine", 1, 5) == pytest.approx(0.5 - 0.5**1.5)
    assert tempering_share("none", 4, 5) == 0
    assert tempering_share("linear", 0, 1) == 1


def test_oscillations_are_one_watch_over_search_and_finetune(make_config: Make, until: Until) -> None:
    config = make_config(stages=SHORT, data=DATA, oscillation={"dampen": 0.1, "freeze": 0.01})
    trainer = until(Trainer(config), "search")
    assert trainer.stage is not None
    watch = trainer.stage.oscillations
    assert watch is not None
    assert watch.total_steps == 8
    for batch in trainer.batches():
        trainer.step(*batch)
    trainer.advance()
    assert trainer.stage.oscillations is watch
    trainer.step(*next(trainer.batches()))
    assert watch.state_dict()["calls"] == 5


def test_dampening_is_added_to_the_loss(make_config: Make, until: Until) -> None:
    trainer = until(Trainer(make_config(stages=SHORT, data=DATA, oscillation={"dampen": 0.5})), "finetune")
    assert trainer.stage is not None
    assert trainer.stage.oscillations is not None
    state = trainer.stage.oscillations.state_dict()
    trainer.stage.oscillations.load_state_dict({**state, "calls": 7})
    added = trainer.stage.penalty(torch.zeros(()))
    torch.testing.assert_close(added, trainer.stage.oscillations.penalty())
    assert bool(added > 0)


def trained(config: TrainConfig, path: Path, stops: set[int]) -> Trainer:
    """Train to the end; after so many steps, go on from a checkpoint in a new trainer."""
    trainer = Trainer(config)
    while trainer.progress.stage != "done":
        while trainer.progress.epoch < trainer.epochs:
            for batch in trainer.batches():
                trainer.step(*batch)
                if trainer.progress.steps_total in stops:
                    break
            if trainer.progress.step == len(trainer.data.train):
                trainer.progress.epoch, trainer.progress.step = trainer.progress.epoch + 1, 0
            if trainer.progress.steps_total in stops:
                trainer.checkpoint().save(path)
                trainer = Trainer(config, Checkpoint.load(path))
        trainer.settle()
        trainer.advance()
    return trainer


def test_resume_with_tempering_and_oscillations_is_exact(make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        stages={**SHORT, "search": {"epochs": 2}, "finetune": {"epochs": 1, "phase": "noise"}},
        data=DATA,
        tempering="cosine",
        oscillation={"dampen": 0.1, "freeze": 0.01},
        ema_decay=0.9,
    )
    expected = trained(config, tmp_path / "checkpoint.pt", set())
    found = trained(config, tmp_path / "checkpoint.pt", {2, 6, 8, 11, 12, 14})  # 4 steps an epoch, 2 epochs of search
    assert found.progress.states == expected.progress.states
    assert found.progress.steps_total == 16
    states = [trainer.model.state_dict() for trainer in (expected, found)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_checkpoint_of_an_older_release_is_read(tmp_path: Path, make_config: Make, until: Until) -> None:
    trainer = until(Trainer(make_config(stages=SHORT, data=DATA)), "search")
    trainer.checkpoint().save(tmp_path / "checkpoint.pt")
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del content["oscillation"]
    torch.save(content, tmp_path / "checkpoint.pt")
    assert Checkpoint.load(tmp_path / "checkpoint.pt").oscillation is None


def test_uniform_bits_need_no_search(make_config: Make, tmp_path: Path) -> None:
    budget = {"average_bits": {"weights": 3.5, "activations": 4}}
    stages = {**SHORT, "finetune": {"epochs": 0}}
    config = make_config(stages=stages, data=DATA, budget=budget, allocation="uniform", oscillation={})
    results = run(config, tmp_path / "run", quiet=True)
    assert results["average_bits"] == {"weights": 3, "activations": 4}
    assert [limit["rounded"] for limit in results["limits"]] == pytest.approx([3, 4])
    assert results["verified"] is True
    row = RunFolder(tmp_path / "run").rows()[-1]
    assert "distance" not in row
    assert 0 <= row["oscillating"] <= 1


def test_uniform_bits_are_calibrated_as_they_are(make_config: Make, until: Until) -> None:
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    alphas = []
    for change in ({"allocation": "uniform"}, {"quantization": {"weight_bits": 4, "activation_bits": 4}}):
        model = until(Trainer(make_config(stages=stages, data=DATA, **change)), "search").model
        alphas.append(torch.cat([q.alpha.detach() for q in quantizers(model)]))
    assert torch.equal(*alphas)


def test_bits_from_curvature_keep_the_budget_and_are_calibrated(make_config: Make, until: Until) -> None:
    pytest.importorskip("curvlinops")
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    model = {"factory": "nipq.train.models:digits_net", "kwargs": {"width": 4}}
    trainer = until(Trainer(make_config(model=model, stages=stages, data=DATA, allocation="hawq")), "search")
    found = quantizers(trainer.model)
    assert all(q.is_frozen for q in found)
    assert len({q.bits_rounded for q in found}) > 1
    assert trainer.budget is not None
    assert all(limit.rounded <= limit.target for limit in costs(trainer.model, trainer.budget))
    alphas = [q.alpha.detach().clone() for q in found]
    calibrate(trainer)
    assert all(torch.equal(q.alpha, alpha) for q, alpha in zip(found, alphas, strict=True))


def test_a_start_from_noise_is_near_the_budget_learned_and_calibrated(make_config: Make, until: Until) -> None:
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    trainer = until(Trainer(make_config(stages=stages, data=DATA, bit_start="noise")), "search")
    found = [q for q in quantizers(trainer.model) if not q.is_frozen]
    assert found
    assert len({q.bits_rounded for q in found}) > 1
    assert trainer.budget is not None
    # Starts stay a quarter of a bit off the ends of the range, which may cost as much on average.
    assert all(abs(limit.soft / limit.target - 1) < 0.25 / 4 for limit in costs(trainer.model, trainer.budget))
    alphas = [q.alpha.detach().clone() for q in found]
    calibrate(trainer)
    assert all(torch.equal(q.alpha, alpha) for q, alpha in zip(found, alphas, strict=True))


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_a_start_from_noise_computes_its_losses_as_training_does(
    amp: str | None, make_config: Make, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(passage, "allocate_bits_", lambda *_, **__: found.append(torch.is_autocast_enabled("cpu")))
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    until(Trainer(make_config(stages=stages, data=DATA, bit_start="noise", amp=amp)), "search")
    assert found == [amp is not None]


@pytest.mark.parametrize("allocation", ["uniform", "hawq"])
def test_allocation_needs_a_budget(allocation: str, make_config: Make) -> None:
    with pytest.raises(ConfigError, match=f"expected a budget for allocation '{allocation}'"):
        Trainer(make_config(budget=None, allocation=allocation))
    fixed = {"weight_bits": 3, "activation_bits": 5}
    assert Trainer(make_config(budget=None, allocation=allocation, quantization=fixed)).budget is None


OPTIMIZER = {"lr": 0.05, "weight_decay": 0.1, "boundary_decay": 0.3, "boundary_momentum": 0.0, "bits_momentum": 0.5}


@pytest.mark.parametrize(
    ("changes", "field", "values"),
    [
        ({}, "momentum", {"weights": 0.9, "no_decay": 0.9, "ranges": 0.0, "bits": 0.5}),
        ({}, "weight_decay", {"weights": 0.1, "no_decay": 0.0, "ranges": 0.3, "bits": 0.0}),
        ({"quantizer_optimizer": "adam"}, "betas", {"ranges": (0.0, 0.999), "bits": (0.5, 0.999)}),
        (
            {"name": "adamw", "bits_momentum": None},
            "betas",
            {"weights": (0.9, 0.999), "no_decay": (0.9, 0.999), "ranges": (0.0, 0.999), "bits": (0.9, 0.999)},
        ),
    ],
)
def test_boundaries_and_bits_have_settings_of_their_own(
    changes: dict[str, Any], field: str, values: dict[str, Any], make_config: Make, until: Until
) -> None:
    trainer = until(Trainer(make_config(stages=SHORT, data=DATA, optimizer={**OPTIMIZER, **changes})), "search")
    assert trainer.stage is not None
    groups = [group for optimizer in trainer.stage.optimizers.all for group in optimizer.param_groups]
    assert {group["name"]: group[field] for group in groups if field in group} == values
    trainer.step(*next(trainer.batches()))  # momentum 0 beside nesterov is fine


def test_boundary_decay_pulls_boundaries_alone(make_config: Make, until: Until) -> None:
    def after_a_step(decay: float) -> dict[str, torch.Tensor]:
        optimizer = {"lr": 0.05, "boundary_decay": decay}
        trainer = until(Trainer(make_config(stages=SHORT, data=DATA, optimizer=optimizer)), "search")
        trainer.step(*next(trainer.batches()))
        return {name: p.detach() for name, p in trainer.model.named_parameters()}

    plain, decayed = after_a_step(0.0), after_a_step(0.1)
    moved = {name for name in plain if not torch.equal(plain[name], decayed[name])}
    boundaries = {name for name in plain if name.endswith("alpha_raw")}
    assert len(moved) == len(boundaries) - 1  # the image's is not learned
    assert moved < boundaries
