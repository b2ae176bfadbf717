"""Settings of a training run: YAML file, method words and overrides become one frozen, checked tree.

A YAML file and the command line's ``--set`` both end in a :class:`TrainConfig`. Unknown fields are refused, so a
misspelt word never trains silently with a default. A method word such as ``lsq`` stands for the settings that its
authors would choose; what a file says itself stands above them.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from nipq.config import Config, Settings
from nipq.errors import ConfigError, did_you_mean
from nipq.qat.oscillation import FREEZE_START

#: Quantization methods that train with noise, see :attr:`nipq.config.Config.method`.
NOISY = ("nipq", "diffq")

# ---------------------------------------------------------------------- sections


class ModelConfig(Settings):
    """The network to build and the float weights to start from.

    Attributes:
        factory: a torchvision name such as ``resnet18``, or an import path ``package.module:callable``.
        kwargs: arguments of the factory.
        weights: ``None`` for a random start, ``"DEFAULT"`` for torchvision's published weights, or the path of a state
            dict (``.pt``, ``.pth`` or ``.safetensors``).
    """

    factory: str
    kwargs: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None


class DataConfig(Settings):
    """The data set and its batches.

    Attributes:
        kind: ``digits`` (inside scikit-learn), ``fashion_mnist`` (a folder of idx files), ``image_folder``
            (``path/train/<class>/*`` and ``path/val/<class>/*``; ``val`` is the test split) or ``custom``.
        factory: import path ``package.module:callable`` of a ``custom`` data set, called with this section and the
            seed; it returns :class:`~nipq.train.batches.Sources`.
        kwargs: settings of its own that the factory may read.
        path: the folder, for the kinds that need one.
        batch_size: images per training step, of all processes together.
        eval_batch_size: images per evaluation batch.
        workers: loader processes (``image_folder`` only), at most as many as there are cores.
        image_size: side of the square crop in pixels (``image_folder`` only; the shorter side is first resized to
            8/7 of it for evaluation, 256 for 224).
        interpolation: resampling of ``image_folder``.
        augment: random crops or shifts and flips while training.
        validation: fraction of the training images that is held out and evaluated after each epoch.
        train_limit: use at most this many training images (``None``: all of them).
    """

    kind: Literal["digits", "fashion_mnist", "image_folder", "custom"]
    factory: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    path: str | None = None
    batch_size: int = Field(default=128, ge=1, le=2**20)
    eval_batch_size: int = Field(default=256, ge=1, le=2**20)
    workers: int = Field(default=0, ge=0, le=1024)
    image_size: int = Field(default=224, ge=8, le=8192)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    augment: bool = True
    validation: float = Field(default=0.1, ge=0.0, lt=1.0)
    train_limit: int | None = Field(default=None, ge=1, le=2**40)

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

    weights: float | None = Field(default=None, gt=0, le=16)
    activations: float | None = Field(default=None, gt=0, le=16)


class BudgetConfig(Settings):
    """The limits that the finished model keeps. Every limit given holds at once.

    Attributes:
        average_bits: average bits of weights and activations.
        model_size: bytes on disk, as a number or text such as ``"1.2 MB"``.
        bit_ops: bit-operations for one image, as a number or text such as ``"5.3 G"``.
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

    epochs: int = Field(default=0, ge=0, le=100_000)
    lr: float | None = Field(default=None, gt=0, le=1e3)


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
        name: optimizer of the model's own parameters.
        lr: peak learning rate.
        momentum: of ``sgd``.
        nesterov: of ``sgd``.
        weight_decay: on weight tensors only; never on biases, batch norms, clipping ranges or bits.
        range_decay: weight decay of the clipping ranges; PACT regularises its ranges so.
        range_lr: peak learning rate of the clipping ranges (``None``: ``lr``).
        bits_lr: peak learning rate of the bit parameters (``None``: ``lr``).
        range_momentum: momentum of the clipping ranges, of Adam its first beta (``None``: as their optimizer has it).
        bits_momentum: momentum of the bit parameters, likewise.
        quantizer_optimizer: ``same`` as the model, or ``adam`` of their own for clipping ranges and bits.
        warmup_epochs: length of the linear warm-up of the float and the search stage.
        warmup_start: factor on the learning rate at the first step of the warm-up.
        final: factor on the learning rate where the cosine ends.
        schedule: ``per_stage`` (one cosine per stage; fine-tuning starts without momentum) or ``spanning`` (one over
            search and fine-tuning together, with the optimizer's momentum carried across).
        step: change the learning rate once per ``batch`` or once per ``epoch``.
    """

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0, le=1e3)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    nesterov: bool = True
    weight_decay: float = Field(default=0.0, ge=0.0, le=1e3)
    range_decay: float = Field(default=0.0, ge=0.0, le=1e3)
    range_lr: float | None = Field(default=None, gt=0, le=1e3)
    bits_lr: float | None = Field(default=None, gt=0, le=1e3)
    range_momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    bits_momentum: float | None = Field(default=None, ge=0.0, lt=1.0)
    quantizer_optimizer: Literal["same", "adam"] = "same"
    warmup_epochs: float = Field(default=0.0, ge=0.0, le=100_000)
    warmup_start: float = Field(default=0.1, gt=0.0, le=1.0)
    final: float = Field(default=0.01, ge=0.0, le=1.0)
    schedule: Literal["per_stage", "spanning"] = "per_stage"
    step: Literal["batch", "epoch"] = "batch"


class OscillationConfig(Settings):
    """Remedies for weights that swing between two levels, see :class:`nipq.qat.oscillation.Oscillations`.

    Attributes:
        dampen: final weight of the pull to the middle of the bin; ``None`` for none.
        freeze: final frequency above which a weight is fixed, at most 0.1; ``None`` to fix none. With neither,
            oscillations are only counted.
    """

    dampen: float | None = Field(default=None, ge=0.0, le=1e6)
    freeze: float | None = Field(default=None, gt=0.0, le=FREEZE_START)


class TeacherConfig(ModelConfig):
    """A float network whose softened answers are learned beside the labels.

    Attributes:
        weight: factor on the distillation loss.
        temperature: softens both distributions; the loss is multiplied by its square to keep gradient size.
    """

    weights: str | None = "DEFAULT"
    weight: float = Field(default=1.0, gt=0, le=1e6)
    temperature: float = Field(default=1.0, gt=0, le=1e6)


class ParallelConfig(Settings):
    """Settings of a run in several processes; without effect on a single one.

    Attributes:
        strategy: ``ddp`` keeps the whole model on every rank; ``fsdp`` shards it while a stage trains.
        sync_batchnorm: batch norms see the batches of all ranks, as in one process.
        timeout: minutes that a rank waits for the others.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    sync_batchnorm: bool = True
    timeout: float = Field(default=30.0, gt=0, le=100_000)


class TrainConfig(Settings):
    """Everything a run depends on; the same config and seed give the same numbers on the same machine.

    Attributes:
        method: a word of :data:`METHODS`; its settings apply where this config gives none.
        task: ``classification``, or ``package.module:callable``, called with this config for a
            :class:`~nipq.train.task.Task`.
        model: the network.
        data: the inputs and targets.
        budget: the limits on the finished model; ``None`` only when every bit-width is fixed by ``quantization``.
        quantization: settings of :func:`nipq.prepare_`.
        allocation: where the first bit-widths come from. ``noise``: learned, from the budget on, shared out by what
            noise costs each tensor; ``sensitivity``: by the same, measured twice, fixed; ``middle``: learned, from the
            middle of their range on; ``uniform``: the largest one for all tensors that keeps the budget, fixed;
            ``hawq``: by curvature and rounding error, fixed.
        stages: lengths of the stages.
        optimizer: optimizer and schedule.
        penalty: how the search pulls bits to the budget: ``controller`` (size-normalised) or ``paper``.
        noise_mix: how the share of the true rounding error in the noise rises over the search, from 0 to 1.
        oscillation: calming of weights that swing between two levels; ``None``: left alone.
        teacher: distillation, or ``None``.
        ema_decay: decay of the weight average that replaces the weights at the end of a stage, or ``None``.
        batchnorm_batches: batches for re-estimating batch-norm statistics after freezing; 0 leaves them alone.
        calibration_batches: batches that set the first clipping ranges.
        verify_batches: test batches on which the deployed model is compared with the trained one.
        label_smoothing: of the cross entropy.
        parallel: what several processes do, see :class:`ParallelConfig`.
        amp: ``bf16`` runs the training forward in mixed precision.
        channels_last: memory layout of model and images.
        device: ``auto`` takes CUDA when there is one.
        threads: of the CPU, ``None`` for torch's choice. With one, numbers do not depend on the machine's cores.
        seed: of weights, data order, augmentation and noise.
        checkpoint_every: also checkpoint after every so many steps (``None``: after each epoch only).
    """

    method: str = "nipq"
    task: str = "classification"
    model: ModelConfig
    data: DataConfig
    budget: BudgetConfig | None
    quantization: Config = Config()
    allocation: Literal["noise", "sensitivity", "middle", "uniform", "hawq"] = "noise"
    stages: StagesConfig = StagesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    penalty: Literal["controller", "paper"] = "controller"
    noise_mix: Literal["none", "linear", "cosine"] = "none"
    oscillation: OscillationConfig | None = None
    teacher: TeacherConfig | None = None
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    batchnorm_batches: int = Field(default=32, ge=0, le=1e6)
    calibration_batches: int = Field(default=8, ge=1, le=1e6)
    verify_batches: int = Field(default=4, ge=1, le=1e6)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    parallel: ParallelConfig = ParallelConfig()
    amp: Literal["bf16"] | None = None
    channels_last: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=4096)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    checkpoint_every: int | None = Field(default=None, ge=1, le=10**9)

    @model_validator(mode="before")
    @classmethod
    def _method(cls, fields: Any) -> Any:  # noqa: ANN401 - whatever is to become a config
        """Put the settings of the method under the given ones."""
        return with_method(fields) if isinstance(fields, Mapping) else fields

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.parallel.strategy == "fsdp" and self.oscillation:
            raise ValueError(
                "expected no oscillation beside parallel.strategy fsdp, which holds parts of weights; leave it out, or "
                "choose ddp"
            )
        return self

    @model_validator(mode="after")
    def _noise_to_mix(self) -> Self:
        if self.noise_mix != "none" and self.quantization.method not in NOISY:
            raise ValueError(
                f"expected a method with noise beside noise_mix, found quantization.method "
                f"{self.quantization.method!r}; choose one of {', '.join(NOISY)}, or leave noise_mix out"
            )
        return self


# ---------------------------------------------------------------------- methods

#: One optimizer and one learning rate for weights and ranges.
_ONE_OPTIMIZER = {"quantizer_optimizer": "same", "range_lr": None}

_DIFFQ_BITS = {"min": 2, "max": 15, "start": 8}
_DIFFQ: dict[str, Any] = {
    "quantization": {
        "method": "diffq",
        "noise": "gaussian",
        "init": "max",
        "weight_bits": _DIFFQ_BITS,
        "activation_bits": _DIFFQ_BITS,
    },
    "allocation": "middle",
    "stages": {"finetune": {"phase": "noise"}},
}
_RELEASE_BITS = {"min": 2, "max": 14, "start": 8}

#: Fields of a run's config by method word: estimator, start, way to bit-widths, optimizer of clipping ranges. Epochs,
#: learning rate of the weights, teacher, budget and the layers that count are the run's, the same for all. The
#: equations are in :mod:`nipq.functional.baselines`.
METHODS: dict[str, dict[str, Any]] = {
    # The default: noise proxy with uniform noise, learned bits that start at the budget, size-normalised controller,
    # least-squares start of ranges.
    "nipq": {},
    # Noise proxy at one bit-width for all: what the proxy does without the search.
    "nipq-fixed": {"allocation": "uniform"},
    # Noise proxy at bit-widths that noise sensitivity chose, fixed from the start.
    "nipq-sensitivity": {"allocation": "sensitivity"},
    # Noise from the tensor's own rounding errors, as in the paper's theory.
    "nipq-empirical": {"quantization": {"noise": "empirical"}},
    # The published code: its start, range, sampler, penalty and single optimizer; no BN re-estimation.
    "nipq-release": {
        "quantization": {
            "noise": "histogram",
            "init": "release",
            "weight_bits": _RELEASE_BITS,
            "activation_bits": _RELEASE_BITS,
        },
        "allocation": "middle",
        "penalty": "paper",
        "optimizer": {**_ONE_OPTIMIZER, "bits_lr": None},
        "batchnorm_batches": 0,
    },
    # arXiv 1902.08153: the step learned straight through, its gradient scaled; one bit-width for all.
    "lsq": {"quantization": {"method": "lsq", "init": "lsq"}, "allocation": "uniform", "optimizer": _ONE_OPTIMIZER},
    # arXiv 2004.09576: a learned offset for inputs, and a least-squares start.
    "lsq+": {"quantization": {"method": "lsq+", "init": "mse"}, "allocation": "uniform", "optimizer": _ONE_OPTIMIZER},
    # LSQ with bit-widths learned straight through, under the same controller as ours. Not in LSQ's paper.
    "lsq-learned": {"quantization": {"method": "lsq", "init": "mse"}, "allocation": "middle"},
    # LSQ with bit-widths from Hessian traces and an integer programme (HAWQ-v2, arXiv 1911.03852; v3, 2011.10680).
    "lsq-hawq": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "hawq",
        "optimizer": _ONE_OPTIMIZER,
    },
    # The control of a comparison: rounding with our bit-widths, start of ranges and optimizer, but without noise.
    "lsq-sensitivity": {"quantization": {"method": "lsq", "init": "mse"}, "allocation": "sensitivity"},
    # arXiv 2203.11086: LSQ with weights that swing between two levels damped, or frozen.
    "lsq-dampen": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "uniform",
        "optimizer": _ONE_OPTIMIZER,
        "oscillation": {"dampen": 0.005},  # the published 0.1 is per channel and mean over the kernel; this is a sum
    },
    "lsq-freeze": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "uniform",
        "optimizer": _ONE_OPTIMIZER,
        "oscillation": {"freeze": 0.01},
    },
    # arXiv 1805.06085: inputs clipped at a learned, decayed range; weights by their moments (arXiv 1807.06964).
    "pact": {
        "quantization": {"method": "pact", "init": "mse"},
        "allocation": "uniform",
        "optimizer": {**_ONE_OPTIMIZER, "range_decay": 5e-4},
    },
    # arXiv 2104.09987: noise of the whole min-max range, real-valued learned bits, no truncation; never rounds in
    # training. DiffQ quantizes weights only; the first two words treat inputs by the same rule.
    "diffq": _DIFFQ,
    "diffq-uniform": {**_DIFFQ, "quantization": {**_DIFFQ["quantization"], "noise": "uniform"}},
    "diffq-weights": {**_DIFFQ, "quantization": {**_DIFFQ["quantization"], "quantize_inputs": False}},
    # Straight through with the range that calibration found.
    "ste": {"quantization": {"method": "ste", "init": "mse"}, "allocation": "uniform"},
}

#: Sections that are replaced as a whole: a range is not made of two.
WHOLE = ("weight_bits", "activation_bits")


def with_method(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run's config, completed by those of the method that they name.

    Args:
        fields: nested values; ``method`` is a word of :data:`METHODS`, ``"nipq"`` if left out.

    Returns:
        A new tree, in which what was given stands.

    Raises:
        ConfigError: if there is no such method; the message lists them.
    """
    word = fields.get("method", "nipq")
    if not isinstance(word, str) or word not in METHODS:
        hint = did_you_mean(str(word), METHODS, "correct it.")
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, found {word!r}; {hint}")
    return merged(METHODS[word], fields)


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields laid over each other: what several have is taken from the last, sections are joined.

    Args:
        trees: nested values; of :class:`~nipq.config.Settings` laid over a section only the given fields count.

    Returns:
        A new tree that shares nothing with the given ones.

    Example:
        >>> merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}}, {"d": None})
        {'a': {'b': 4, 'c': 2}, 'd': None}
    """
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            new = value.model_dump(exclude_unset=True) if key in result and isinstance(value, Settings) else value
            joined = key not in WHOLE and isinstance(old, Mapping) and isinstance(new, Mapping)
            result[key] = merged(old, new) if joined else copy.deepcopy(value)  # type: ignore[arg-type]  # trees if joined
    return result


# ---------------------------------------------------------------------- files and overrides


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a YAML file into a checked config.

    Args:
        path: the file.
        overrides: dotted field names and the values that replace the file's, e.g. ``{"optimizer.lr": 0.01}``.

    Returns:
        The config.

    Raises:
        ConfigError: if the file is missing, is not YAML, or a field is unknown or wrong. The message names the field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"expected a YAML config file, found {str(path)!r}: {error}; give the path of one") from error
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"expected a mapping of fields in {path}, found {type(tree).__name__}; see configs/ for examples"
        )
    for key, value in (overrides or {}).items():
        _set(tree, key, value)
    return check_config(tree, source=str(path))


def check_config(tree: Mapping[str, Any], source: str = "config") -> TrainConfig:
    """Turn nested plain values into a config.

    Args:
        tree: nested mappings, as read from YAML or JSON.
        source: name of the tree for messages.

    Returns:
        The config.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    try:
        return TrainConfig.model_validate(tree)
    except ConfigError as error:
        raise ConfigError(f"{source} is not a valid config:\n{error}") from error


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """Read ``key=value`` texts; the value is YAML, so ``3``, ``true``, ``null`` and ``[1, 2]`` mean what they say.

    Args:
        assignments: the texts, e.g. ``["seed=3", "optimizer.lr=0.01"]``.

    Returns:
        Values by dotted field name.

    Raises:
        ConfigError: if a text has no ``=`` or its value is not YAML.

    Example:
        >>> parse_overrides(["seed=3", "teacher=null"])
        {'seed': 3, 'teacher': None}
    """
    result = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"expected key=value, found {text!r}; write for instance optimizer.lr=0.01")
        result[key.strip()] = read_yaml(value, f"the value of {key.strip()}")
    return result


def dump_config(config: TrainConfig) -> str:
    """The config as YAML text that :func:`load_config` reads back to an equal config."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


#: Most characters of a config: a thousand times what the longest in ``configs/`` has.
LONGEST = 1_000_000


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key stands twice and no alias repeats anything: a few of them can fill any memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, refusing aliases."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "found an alias (*name); write the value out", mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, refusing a key that it has already."""
        keys: set[Hashable] = set()
        for name, _ in node.value:
            key = name.value if isinstance(name, yaml.ScalarNode) else id(name)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"found the key {key!r} twice", name.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
    """Read YAML text; nothing in it is run, and a key that stands twice is refused.

    Args:
        text: the YAML.
        source: name of the text for messages.

    Returns:
        Nested plain values.

    Raises:
        ConfigError: if the text is not YAML.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{source}: expected at most {LONGEST:,} characters of YAML, found {len(text):,}; shorten it")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # numbers and dates that Python has not
        raise ConfigError(f"{source} is not YAML: {error}; correct it at the place named") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: expected YAML of a few levels, found too many; write it flat") from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - a YAML value
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"cannot set {key}: {name!r} is {child!r}, not a section; set {name!r} itself instead")
        node = child
    node[last] = value
