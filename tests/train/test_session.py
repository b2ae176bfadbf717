"""The session inside a run: phases, noise mix, oscillations, allocation of bits, exact resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from nipq.budget.budget import AverageBits, costs
from nipq.config import Phase
from nipq.errors import ConfigError
from nipq.functional.counter_rng import seed_of
from nipq.prepare.layer_table import quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat import session
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession, calibrate_and_allocate_
from nipq.train.batches import Few, moved
from nipq.train.checkpoint import Checkpoint
from nipq.train.config import TrainConfig
from nipq.train.data import load_data
from nipq.train.models import digits_net
from nipq.train.optim import schedule_of
from nipq.train.pipeline import run
from nipq.train.run_folder import RunFolder
from nipq.train.trainer import Trainer, _SessionLoader

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


def test_the_noise_mix_reaches_the_true_error(make_config: Make, until: Until) -> None:
    stages = {**SHORT, "search": {"epochs": 2}, "finetune": {"epochs": 1, "phase": "noise"}}
    trainer = until(Trainer(make_config(stages=stages, data=DATA, noise_mix="linear")), "search")
    shares = []
    for _ in range(2):
        for batch in trainer.batches():
            shares.append({float(q.error_share or 0) for q in quantizers(trainer.model)})
            trainer.step(*batch)
            if trainer.progress.step == 4:
                trainer.close_epoch()
            trainer.follow()
    assert [share for (share,) in shares] == pytest.approx([step / 7 for step in range(8)])
    assert trainer.progress.stage == "finetune"
    assert all(float(q.error_share) == 1 for q in quantizers(trainer.model) if q.error_share is not None)


def test_oscillations_are_one_watch_over_search_and_finetune(make_config: Make, until: Until) -> None:
    config = make_config(stages=SHORT, data=DATA, oscillation={"dampen": 0.1, "freeze": 0.01})
    trainer = until(Trainer(config), "search")
    assert trainer.session is not None
    watch = trainer.session.oscillations
    assert watch is not None
    assert watch.total_steps == 8
    until(trainer, "finetune")
    assert trainer.session.oscillations is watch
    trainer.step(*next(trainer.batches()))
    trainer.follow()
    assert watch.state_dict()["calls"] == 5


def trained(config: TrainConfig, path: Path, stops: set[int]) -> Trainer:
    """Train to the end; after so many steps, go on from a checkpoint in a new trainer."""
    trainer = Trainer(config)
    while trainer.progress.stage != "done":
        stage = trainer.progress.stage
        while trainer.progress.stage == stage and trainer.progress.epoch < trainer.epochs:
            for batch in trainer.batches():
                trainer.step(*batch)
                if trainer.progress.step == len(trainer.train):
                    trainer.close_epoch()
                trainer.follow()
                if trainer.progress.steps_total in stops:
                    break
            if trainer.progress.steps_total in stops:
                trainer.checkpoint().save(path)
                trainer = Trainer(config, Checkpoint.load(path))
                stops = stops - {trainer.progress.steps_total}
        if trainer.progress.stage == stage:
            trainer.advance()
    return trainer


def test_resume_with_noise_mix_and_oscillations_is_exact(make_config: Make, tmp_path: Path) -> None:
    config = make_config(
        stages={**SHORT, "search": {"epochs": 2}, "finetune": {"epochs": 1, "phase": "noise"}},
        data=DATA,
        noise_mix="cosine",
        oscillation={"dampen": 0.1, "freeze": 0.01},
        ema_decay=0.9,
    )
    expected = trained(config, tmp_path / "checkpoint.pt", set())
    found = trained(config, tmp_path / "checkpoint.pt", {2, 6, 8, 11, 12, 14})  # 4 steps an epoch, 2 epochs of search
    assert found.progress.states == expected.progress.states
    assert found.progress.steps_total == 16
    states = [trainer.model.state_dict() for trainer in (expected, found)]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_resume_where_there_is_no_search_is_exact(make_config: Make, tmp_path: Path) -> None:
    stages = {"float": {"epochs": 1}, "search": {"epochs": 0}, "finetune": {"epochs": 2}}
    config = make_config(stages=stages, data=DATA, allocation="uniform", ema_decay=0.9)
    expected = trained(config, tmp_path / "checkpoint.pt", set())
    found = trained(config, tmp_path / "checkpoint.pt", {5, 8, 10})
    assert found.progress.states == expected.progress.states
    assert {"frozen", "bn"} < found.progress.states.keys()


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
    calibrate_(trainer.model, _SessionLoader(trainer), trainer.config.calibration_batches)
    assert all(torch.equal(q.alpha, alpha) for q, alpha in zip(found, alphas, strict=True))


def test_a_start_from_noise_is_near_the_budget_learned_and_calibrated(make_config: Make, until: Until) -> None:
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    trainer = until(Trainer(make_config(stages=stages, data=DATA, allocation="noise")), "search")
    found = [q for q in quantizers(trainer.model) if not q.is_frozen]
    assert found
    assert len({q.bits_rounded for q in found}) > 1
    assert trainer.budget is not None
    # Starts stay a quarter of a bit off the ends of the range, which may cost as much on average.
    assert all(abs(limit.soft / limit.target - 1) < 0.25 / 4 for limit in costs(trainer.model, trainer.budget))
    alphas = [q.alpha.detach().clone() for q in found]
    calibrate_(trainer.model, _SessionLoader(trainer), trainer.config.calibration_batches)
    assert all(torch.equal(q.alpha, alpha) for q, alpha in zip(found, alphas, strict=True))


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_a_start_from_noise_computes_its_losses_as_training_does(
    amp: str | None, make_config: Make, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(session, "allocate_bits_", lambda *_, **__: found.append(torch.is_autocast_enabled("cpu")))
    stages = {"float": {"epochs": 0}, "search": {"epochs": 1}, "finetune": {"epochs": 0}}
    until(Trainer(make_config(stages=stages, data=DATA, allocation="noise", amp=amp)), "search")
    assert found == [amp is not None]


@pytest.mark.parametrize("allocation", ["uniform", "hawq"])
def test_allocation_needs_a_budget(allocation: str, make_config: Make) -> None:
    with pytest.raises(ConfigError, match=f"expected a budget for allocation '{allocation}'"):
        Trainer(make_config(budget=None, allocation=allocation))
    fixed = {"weight_bits": 3, "activation_bits": 5}
    assert Trainer(make_config(budget=None, allocation=allocation, quantization=fixed)).budget is None


def test_a_run_is_a_plain_loop_around_a_session(make_config: Make, until: Until) -> None:
    """Data, seeds and schedule of the run, the loop of the README: equal losses, bits and weights."""
    stages = {"float": {"epochs": 0}, "search": {"epochs": 9}, "finetune": {"epochs": 4, "lr": 0.01}}  # 52 steps
    config = make_config(stages=stages, data=DATA)
    trainer = until(Trainer(config), "search")
    losses = []
    while trainer.progress.epoch < trainer.epochs:
        for batch in trainer.batches():
            before = trainer.tally.look()[0]
            trainer.step(*batch)
            losses.append((trainer.tally.look()[0] - before) / 32)
            if trainer.progress.step == 4:
                trainer.close_epoch()
            trainer.follow()
    trainer.advance()
    assert trainer.progress.stage == "done"

    seed = config.seed
    torch.manual_seed(seed_of(seed, "model"))
    model = digits_net(width=8)
    data = load_data(config.data, seed)
    prepare_(model, next(iter(data.test))[0][:1], config.quantization)
    cpu = torch.device("cpu")  # the strides of a batch decide about its kernels, and so about its rounding errors
    loader = [(moved(x, cpu), y) for x, y in Few(data.train, 4, seed_of(seed, "calibration"))]
    settings = {"calibration_batches": 2, "seed": seed_of(seed, "allocation")}
    calibrate_and_allocate_(model, loader, AverageBits(4, 4), cross_entropy, **settings)
    optimizer = torch.optim.SGD(param_groups(model, 0.05, 1e-4), lr=0.05, momentum=0.9, nesterov=True)
    session = QATSession(
        model, AverageBits(4, 4), 52, loader=loader, loss_fn=cross_entropy, optimizer=optimizer, finetune=16 / 52,
        schedule=schedule_of(config, ["search", "finetune"], 4), batchnorm_batches=3,
    )  # fmt: skip
    model.train()
    found = []
    for stage, epochs in (("search", 9), ("finetune", 4)):
        for epoch in range(epochs):
            for step, (x, y) in enumerate(data.train.epoch(seed_of(seed, "data", stage, epoch))):
                torch.manual_seed(seed_of(seed, stage, epoch, step))
                loss = cross_entropy(model(moved(x, cpu)), y)
                (loss + session.penalty()).backward()
                optimizer.step()
                optimizer.zero_grad()
                session.step()
                found.append(loss.item())
        if stage == "search":
            optimizer.state.clear()  # a new curve starts without momentum
    session.finish()
    assert found == pytest.approx(losses, rel=1e-6)
    assert [q.bits_rounded for q in quantizers(model)] == [q.bits_rounded for q in quantizers(trainer.model)]
    states = model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
