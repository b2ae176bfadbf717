"""A Lightning trainer with one callback more."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from nipq.budget.budget import AverageBits, costs
from nipq.errors import ConfigError, OrderError
from nipq.prepare.layer_table import phase_of, quantizers
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("pytorch_lightning")

from nipq.integrations.lightning import NipqCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

X = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(48) % 3
BUDGET = AverageBits(weights=4, activations=4)
EPOCHS, BATCHES = 5, 6


class Net(pl.LightningModule):
    """As people write them."""

    def __init__(self, prepared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(8, 3))
        if prepared:
            calibrate_(prepare_(self.net, X[:1]), [X])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor | dict[str, Tensor]:
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(param_groups(self, 1e-2, 1e-2, bits_lr=5e-2))
        steps = self.trainer.estimated_stepping_batches
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)


@pytest.fixture
def fit(tmp_path: Path) -> Callable[..., Any]:
    def run(
        model: pl.LightningModule | None = None, *, callbacks: tuple[Any, ...] = (), resume: Path | None = None,
        ours: dict[str, Any] | None = None, **settings: Any,
    ) -> Any:  # fmt: skip
        torch.manual_seed(0)
        session: dict[str, Any] = {"finetune": 0.3} | (ours or {})
        given: dict[str, Any] = {"max_epochs": EPOCHS, "logger": False, "enable_checkpointing": False} | settings
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[*callbacks, NipqCallback(BUDGET, **session)], **given,
        )  # fmt: skip
        model = Net() if model is None else model
        trainer.fit(model, loader(), DataLoader(TensorDataset(X, Y), batch_size=48), ckpt_path=resume)
        return trainer

    return run


def session_of(trainer: Any) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, NipqCallback)).session


def keeps(model: nn.Module) -> bool:
    return all(q.is_frozen for q in quantizers(model)) and all(c.rounded <= c.target for c in costs(model, BUDGET))


def test_a_fit_goes_through_all_stages_and_gives_the_module_back(fit: Callable[..., Any]) -> None:
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append((session_of(trainer).stage, str(phase_of(pl_module))))

    trainer = fit(callbacks=(Watch(),), gradient_clip_val=1.0)
    session = session_of(trainer)
    assert session.stage == "done"
    assert (session.steps, session.total_steps, session.search_steps) == (30, 30, 21)
    assert seen[19] == ("search", "noise")
    assert seen[-1] == ("finetune", "round")
    assert keeps(trainer.lightning_module)
    assert "training_step" not in vars(trainer.lightning_module)
    assert len(trainer.optimizers[0].param_groups) == 4


def test_the_penalty_is_in_the_loss_and_dictionaries_stay_dictionaries(fit: Callable[..., Any]) -> None:
    class Answers(Net):
        def training_step(self, batch: Any) -> dict[str, Any]:
            return {"loss": cross_entropy(self(batch[0]), batch[1]), "more": 1}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            assert outputs["more"] == 1

    assert keeps(fit(Answers(), callbacks=(Watch(),), max_epochs=2).lightning_module)


def test_clipping_does_not_see_the_bits(fit: Callable[..., Any]) -> None:
    norms: list[tuple[float, float]] = []

    class Watch(pl.Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            named = [(name, p.grad.norm()) for name, p in pl_module.named_parameters() if p.grad is not None]
            bits = [norm for name, norm in named if name.endswith("bit_raw")]
            others = [norm for name, norm in named if not name.endswith("bit_raw")]
            if bits:
                norms.append((float(torch.stack(bits).norm()), float(torch.stack(others).norm())))

    fit(callbacks=(Watch(),), gradient_clip_val=1e-4, max_epochs=2)
    assert len(norms) > 4
    assert all(bits > 2e-4 and others < 1.001e-4 for bits, others in norms)


def test_gradients_accumulate(fit: Callable[..., Any]) -> None:
    session = session_of(fit(accumulate_grad_batches=2))
    assert (session.steps, session.total_steps) == (15, 15)


def test_bf16_and_a_step_that_the_scaler_skipped(fit: Callable[..., Any]) -> None:
    trainer = fit(precision="bf16-mixed", max_epochs=2)
    assert {q.alpha_raw.dtype for q in quantizers(trainer.lightning_module)} == {torch.float32}

    class Overflow(Net):
        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self(batch[0]), batch[1]) * (float("inf") if self.global_step == 4 else 1)

    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer = fit(Overflow(), plugins=plugin, precision=None, max_epochs=2)
    assert (trainer.global_step, session_of(trainer).steps) == (12, 11)
    assert keeps(trainer.lightning_module)


def test_true_half_precision_is_refused(fit: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected clipping ranges and bit-widths in float32, found torch.bfloat16"):
        fit(precision="bf16-true")


def test_stopping_early_gives_a_frozen_model(fit: Callable[..., Any]) -> None:
    stop = pl.callbacks.EarlyStopping("val_loss", patience=1, min_delta=100.0)
    trainer = fit(callbacks=(stop,))
    assert session_of(trainer).steps < session_of(trainer).search_steps
    assert session_of(trainer).stage == "done"
    assert keeps(trainer.lightning_module)


def test_scores_start_anew_at_the_freeze(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Scores of the search are better here; the first after the freeze would stop training, and none be the best."""

    class Judged(Net):
        def validation_step(self, batch: Any) -> None:
            frozen = session_of(self.trainer).bits is not None
            self.log("score", (0.0 if frozen else -100.0) - float(self.global_step))

    stop = pl.callbacks.EarlyStopping("score", patience=1)
    save = pl.callbacks.ModelCheckpoint(tmp_path, monitor="score", save_top_k=1)
    trainer = fit(Judged(), callbacks=(stop, save), enable_checkpointing=True, num_sanity_val_steps=0)
    assert session_of(trainer).steps == EPOCHS * BATCHES
    assert "epoch=4" in save.best_model_path
    trainer.lightning_module.load_state_dict(torch.load(save.best_model_path, weights_only=True)["state_dict"])


def test_logs_go_to_the_trainers_own_logger(fit: Callable[..., Any], tmp_path: Path) -> None:
    trainer = fit(logger=pl.loggers.CSVLogger(tmp_path), log_every_n_steps=3)
    rows = [line.split(",") for line in Path(trainer.logger.log_dir, "metrics.csv").read_text().splitlines()]
    frozen = [float(row[rows[0].index("nipq/frozen")]) for row in rows[1:] if row[rows[0].index("nipq/frozen")]]
    assert frozen == [0.0] * 6 + [1.0] * 4
    assert "nipq/average_weight_bits_soft" in rows[0]


@pytest.fixture(params=[2, 4])
def epoch(request: pytest.FixtureRequest) -> int:
    """Before the freeze and after it."""
    return request.param


def test_resuming_after_an_epoch_equals_not_stopping_to_the_bit(
    fit: Callable[..., Any], tmp_path: Path, epoch: int
) -> None:
    saving = {"enable_checkpointing": True, "limit_val_batches": 0}
    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(callbacks=(save,), **saving).lightning_module.state_dict()
    again = fit(resume=tmp_path / f"epoch={epoch - 1}.ckpt", **saving)
    assert session_of(again).steps == EPOCHS * BATCHES
    found = again.lightning_module.state_dict()
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_a_fit_that_was_over_is_over_again(fit: Callable[..., Any], tmp_path: Path) -> None:
    saving = {"enable_checkpointing": True, "limit_val_batches": 0}
    fit(callbacks=(pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),), **saving)
    again = fit(resume=tmp_path / f"epoch={EPOCHS - 1}.ckpt", **saving)
    assert session_of(again).stage == "done"
    assert keeps(again.lightning_module)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_crosses_the_freeze_and_becomes_the_model(
    fit: Callable[..., Any], use_buffers: bool, tmp_path: Path
) -> None:
    saving = {"enable_checkpointing": True, "limit_val_batches": 0}

    def average() -> Any:
        return pl.callbacks.EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)

    save = pl.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(callbacks=(average(), save), **saving)
    assert keeps(whole.lightning_module)
    assert session_of(whole).bits == {q.name: q.bits_rounded for q in quantizers(whole.lightning_module)}
    again = fit(callbacks=(average(),), resume=tmp_path / "epoch=3.ckpt", **saving).lightning_module.state_dict()
    expected = whole.lightning_module.state_dict()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_callbacks_that_cannot_work_are_refused(fit: Callable[..., Any]) -> None:
    class Endless(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(param_groups(self, 1e-2))

    twice = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[NipqCallback(BUDGET)])
    twice.callbacks.append(NipqCallback(BUDGET))
    with pytest.raises(OrderError, match="expected one NipqCallback, found 2"):
        twice.fit(Net(), loader())
    order = [NipqCallback(BUDGET), pl.callbacks.WeightAveraging()]
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=order)
    with pytest.raises(OrderError, match="expected NipqCallback after WeightAveraging in callbacks"):
        trainer.fit(Net(), loader())
    with pytest.raises(OrderError, match="expected a prepared model"):
        fit(Net(prepared=False))
    with pytest.raises(ConfigError, match="expected a fit of known length, found inf steps"):
        fit(Endless(), max_epochs=-1)

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ConfigError, match="expected automatic optimization, found manual"):
        fit(Manual())


def test_an_optimizer_from_before_prepare_is_refused_and_the_module_given_back(fit: Callable[..., Any]) -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__(prepared=False)
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            calibrate_(prepare_(self.net, X[:1]), [X])

        def configure_optimizers(self) -> Any:
            return self.optimizer

    model = Early()
    with pytest.raises(OrderError, match=r"it lacks .*alpha_raw"):
        fit(model)
    assert "training_step" not in vars(model)


def test_a_part_is_called_for_batch_norms(fit: Callable[..., Any]) -> None:
    calls = []

    class NoForward(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError

        def training_step(self, batch: Any) -> Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        validation_step = None

    model = NoForward()
    model.net[1].register_forward_hook(lambda module, *_: calls.append(module.momentum == 1.0))
    fit(model, ours={"module": "net", "loader": [X[:16]]}, max_epochs=2, limit_val_batches=0)
    assert sum(calls) == 2  # at the freeze and at the finish
    assert keeps(model)


class Uncounted(Net):
    """A module that asks nothing of its trainer."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(param_groups(self, 1e-2))


@pytest.mark.parametrize(
    ("ours", "settings"), [({}, {"max_steps": 7, "max_epochs": -1}), ({"total_steps": 7}, {"max_epochs": 2})]
)
def test_the_trainers_loader_is_found_where_nobody_counted_its_batches(
    fit: Callable[..., Any], ours: dict[str, Any], settings: dict[str, Any]
) -> None:
    trainer = fit(Uncounted(), ours=ours, **settings)
    assert trainer.callbacks[0].session.total_steps == 7
    assert trainer.callbacks[0].session.stage == "done"


def test_a_network_in_evaluation_mode_which_the_trainer_leaves_in_it_is_refused(fit: Callable[..., Any]) -> None:
    model = Net()
    model.net.eval()
    with pytest.raises(OrderError, match=r"expected training mode when session\.penalty\(\) was called"):
        fit(model)
