"""Settings of a training run: one frozen tree of fields, checked when it is read.

A YAML file and the command line's ``--set`` both end in a :class:`TrainConfig`. Unknown fields are refused, so a
misspelt word never trains silently with a default. The file format is read by :mod:`nipq.train.config_file`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nipq.config import Config, Settings
from nipq.qat.oscillation import FREEZE_START
from nipq.train.merging import with_method

NOISY = ("nipq", "diffq")
"""Estimators that train with noise, see :attr:`nipq.config.Config.method`."""


class ModelConfig(Settings):
    """Which network to build and which float weights to start from.

    Attributes:
        factory: A torchvision name such as ``resnet18``, or an import path ``package.module:callable``.
        kwargs: Arguments of the factory.
        weights: ``None`` for a random start, ``"DEFAULT"`` for torchvision's published weights, or the path of a state
            dict (``.pt``, ``.pth`` or ``.safetensors``).
    """

    factory: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class DataConfig(Settings):
    """Where images come from and how they are cut into batches.

    Attributes:
        kind: ``digits`` (inside scikit-learn), ``fashion_mnist`` (a folder of idx files), ``image_folder``
            (``path/train/<class>/*`` and ``path/val/<class>/*``; ``val`` is the test split) or ``custom``.
        factory: Import path ``package.module:callable`` of a ``custom`` data set, called with this section and the
            seed; it returns :class:`~nipq.train.batches.Sources`.
        kwargs: Settings of its own that the factory may read.
        path: The folder, for the kinds that need one.
        batch_size: Images per training step, of all processes together.
        eval_batch_size: Images per evaluation batch.
        workers: Loader processes (``image_folder`` only), at most as many as there are cores.
        image_size: Side of the square crop in pixels (``image_folder`` only; the shorter side is first resized to
            8/7 of it for evaluation, 256 for 224).
        interpolation: Resampling of ``image_folder``.
        augment: Random crops or shifts and flips while training.
        validation: Fraction of the training images that is held out and evaluated after each epoch.
        train_limit: Use at most this many training images (``None``: all of them).
    """

    kind: Literal["digits", "fashion_mnist", "image_folder", "custom"]
    factory: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    batch_size: int = Field(default=128, ge=1)
    eval_batch_size: int = Field(default=256, ge=1)
    workers: int = Field(default=0, ge=0)
    image_size: int = Field(default=224, ge=8)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    augment: bool = True
    validation: float = Field(default=0.1, ge=0.0, lt=1.0)
    train_limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _custom(self) -> Self:
        if (self.kind == "custom") != (self.factory is not None):
            raise ValueError(
                f"expected a factory with kind custom and only there, found kind {self.kind} and factory "
                f"{self.factory!r}; write kind: custom and factory: package.module:callable, or leave factory out"
            )
        return self


class AverageBitsConfig(Settings):
    """Average bits per weight and per activation element; ``None`` leaves that side unlimited."""

    weights: float | None = Field(default=None, gt=0)
    activations: float | None = Field(default=None, gt=0)


class BudgetConfig(Settings):
    """The limits that the finished model keeps. Every limit given holds at once.

    Attributes:
        average_bits: Average bits of weights and activations.
        model_size: Bytes on disk, as a number or text such as ``"1.2 MB"``.
        bit_ops: Bit-operations for one image, as a number or text such as ``"5.3 G"``.
        mode: ``bound`` (stay at or below) or ``target`` (the paper's penalty pulls from both sides).
    """

    average_bits: AverageBitsConfig | None = None
    model_size: int | str | None = None
    bit_ops: float | str | None = None
    mode: Literal["bound", "target"] = "bound"

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        average = self.average_bits
        if average is not None and average.weights is None and average.activations is None:
            raise ValueError("average_bits needs weights, activations or both")
        if average is None and self.model_size is None and self.bit_ops is None:
            raise ValueError("give at least one of average_bits, model_size and bit_ops")
        return self


class StageConfig(Settings):
    """Length of one stage in epochs, and its own peak learning rate (``None``: the optimizer's)."""

    epochs: int = Field(default=0, ge=0)
    lr: float | None = Field(default=None, gt=0)


class FinetuneConfig(StageConfig):
    """The stage with frozen bits: ``phase`` ``round`` trains with the true quantizer, ``noise`` with the method's."""

    phase: Literal["round", "noise"] = "round"


class StagesConfig(Settings):
    """The three stages in order: float training, bit search under noise, fine-tuning with frozen bits."""

    float: StageConfig = StageConfig()
    search: StageConfig = StageConfig(epochs=10)
    finetune: FinetuneConfig = FinetuneConfig()


class OptimizerConfig(Settings):
    """Optimizer and learning-rate schedule.

    Attributes:
        name: Optimizer of the model's own parameters.
        lr: Peak learning rate.
        momentum: Of ``sgd``.
        nesterov: Of ``sgd``.
        weight_decay: On weight tensors only; never on biases, batch-norm, boundaries or bits.
        boundary_decay: Weight decay of the boundaries; PACT regularises its boundaries so.
        boundary_lr: Peak learning rate of the boundaries (``None``: ``lr``).
        bits_lr: Peak learning rate of the bit parameters (``None``: ``lr``).
        boundary_momentum: Momentum of the boundaries, of Adam its first beta (``None``: as their optimizer has it).
        bits_momentum: Momentum of the bit parameters, likewise.
        quantizer_optimizer: ``same`` as the model, or ``adam`` of their own for boundaries and bits.
        warmup_epochs: Length of the linear warm-up of the float and the search stage.
        warmup_start: Factor on the learning rate at the first step of the warm-up.
        final: Factor on the learning rate where the cosine ends.
        schedule: ``per_stage`` (one cosine per stage) or ``spanning`` (one over search and fine-tuning together, with
            the optimizer's momentum carried across).
        step: Change the learning rate once per ``batch`` or once per ``epoch``.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    nesterov: bool = True
    weight_decay: float = Field(default=0.0, ge=0.0)
    boundary_decay: float = Field(default=0.0, ge=0.0)
    boundary_lr: float | None = Field(default=None, gt=0)
    bits_lr: float | None = Field(default=None, gt=0)
    boundary_momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    bits_momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    quantizer_optimizer: Literal["same", "adam"] = "same"
    warmup_epochs: float = Field(default=0.0, ge=0.0)
    warmup_start: float = Field(default=0.1, gt=0.0, le=1.0)
    final: float = Field(default=0.01, ge=0.0, le=1.0)
    schedule: Literal["per_stage", "spanning"] = "per_stage"
    step: Literal["batch", "epoch"] = "batch"


class OscillationConfig(Settings):
    """What calms weights that swing between two levels, see :class:`nipq.qat.oscillation.Oscillations`.

    Attributes:
        dampen: Final weight of the pull to the middle of the bin; ``None`` for none.
        freeze: Final frequency above which a weight is fixed, at most 0.1; ``None`` to fix none. With neither,
            oscillations are only counted.
    """

    dampen: float | None = Field(default=None, ge=0.0)
    freeze: float | None = Field(default=None, gt=0.0, le=FREEZE_START)


class TeacherConfig(ModelConfig):
    """A float network whose softened answers are learned beside the labels.

    Attributes:
        weight: Factor on the distillation loss.
        temperature: Softens both distributions; the loss is multiplied by its square to keep gradient size.
    """

    weights: str | None = "DEFAULT"
    weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=1.0, gt=0)


class ParallelConfig(Settings):
    """What several processes do with a run; without effect on a single one.

    Attributes:
        strategy: ``ddp`` keeps the whole model on every rank; ``fsdp`` shards it while a stage trains.
        sync_batchnorm: Batch norms see the batches of all ranks, as in one process.
        timeout: Minutes that a rank waits for the others.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    sync_batchnorm: bool = True
    timeout: float = Field(default=30.0, gt=0)


class TrainConfig(Settings):
    """Everything a run depends on; the same config and seed give the same numbers on the same machine.

    Attributes:
        method: A word of :data:`nipq.train.methods.METHODS`; its settings apply where this config gives none.
        task: ``classification``, or ``package.module:callable``, called with this config for a
            :class:`~nipq.train.task.Task`.
        model: The network.
        data: The inputs and targets.
        budget: The limits on the finished model; ``None`` only when every bit-width is fixed by ``quantization``.
        quantization: Settings of :func:`nipq.prepare_`.
        allocation: Who chooses bit-widths: ``learned`` in the search; ``uniform``, the largest that keeps the budget,
            one for all tensors; ``hawq``, by curvature and rounding error before training.
        bit_start: Where learned bit-widths start: ``middle`` of their range, or ``noise``, at the budget, shared out by
            what noise costs (:mod:`nipq.budget.sensitivity`).
        stages: Lengths of the stages.
        optimizer: Optimizer and schedule.
        penalty: How the search pulls bits to the budget: ``controller`` (size-normalised) or ``paper``.
        tempering: How the share of the true rounding error in the noise rises over the search, from 0 to 1.
        oscillation: Calming of weights that swing between two levels; ``None``: left alone.
        teacher: Distillation, or ``None``.
        ema_decay: Decay of the weight average that replaces the weights at the end of a stage, or ``None``.
        batchnorm_batches: Batches for re-estimating batch-norm statistics after freezing; 0 leaves them alone.
        calibration_batches: Batches that set the first boundaries.
        verify_batches: Test batches on which the deployed model is compared with the trained one.
        label_smoothing: Of the cross entropy.
        parallel: What several processes do, see :class:`ParallelConfig`.
        amp: ``bf16`` runs the training forward in mixed precision.
        channels_last: Memory layout of model and images.
        device: ``auto`` takes CUDA when there is one.
        threads: Of the CPU, ``None`` for torch's choice. With one, numbers do not depend on the machine's cores.
        seed: Of weights, data order, augmentation and noise.
        checkpoint_every: Also checkpoint after every so many steps (``None``: after each epoch only).
    """

    method: str = "nipq"
    task: str = "classification"
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig | None
    quantization: Config = Config()
    allocation: Literal["learned", "uniform", "hawq"] = "learned"
    bit_start: Literal["middle", "noise"] = "noise"
    stages: StagesConfig = StagesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    penalty: Literal["controller", "paper"] = "controller"
    tempering: Literal["none", "linear", "cosine"] = "none"
    oscillation: OscillationConfig | None = None
    teacher: TeacherConfig | None = None
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    batchnorm_batches: int = Field(default=32, ge=0)
    calibration_batches: int = Field(default=8, ge=1)
    verify_batches: int = Field(default=4, ge=1)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    parallel: ParallelConfig = ParallelConfig()
    amp: Literal["bf16"] | None = None
    channels_last: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    checkpoint_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _method(cls, fields: Any) -> Any:  # noqa: ANN401 - whatever is to become a config
        """Put the settings of the method under the given ones."""
        return with_method(fields) if isinstance(fields, Mapping) else fields

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.parallel.strategy == "fsdp" and (self.oscillation or self.optimizer.schedule == "spanning"):
            raise ValueError(
                "expected neither oscillation nor optimizer.schedule spanning beside parallel.strategy fsdp, which "
                "holds parts of weights and starts each stage with a new optimizer; leave them out, or choose ddp"
            )
        return self

    @model_validator(mode="after")
    def _noise_to_temper(self) -> Self:
        if self.tempering != "none" and self.quantization.method not in NOISY:
            raise ValueError(
                f"expected a method with noise beside tempering, found quantization.method "
                f"{self.quantization.method!r}; choose one of {', '.join(NOISY)}, or leave tempering out"
            )
        return self
