"""``nipq.quantize``: post-training quantization of a float model within a budget, with or without training after it.

Stages, each judged by the distance of the outputs from the float model's on held-out samples and undone where it does
not bring them nearer: clipping ranges by least squared error at one bit-width for all tensors; mixed bits by noise
sensitivity, measured again at the first assignment; batch-norm statistics moved by what quantization changes in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nipq.budget.allocate import allocate_bits_, set_learned_bits_, uniform_bits
from nipq.budget.bit_table import BitTable
from nipq.budget.budget import Budget, check_feasible, costs
from nipq.budget.distance import Judgement, OutputJudge, check_outputs, floats_in, output_distance
from nipq.budget.freeze import freeze_to_
from nipq.budget.sensitivity import LossFn, loss_of
from nipq.config import Config, Phase
from nipq.errors import ConfigError, NonFiniteError, OrderError
from nipq.export.api import ExportReport, export
from nipq.export.packed_write import file_bytes, save
from nipq.nn.deployed import deployed_layers
from nipq.nn.layers import check_module, is_prepared
from nipq.prepare.batches import BatchReader, Inputs, batches_of, call_model, check_rereadable, copy_of, to_device
from nipq.prepare.convert import convert
from nipq.prepare.input_form import ExampleInputs
from nipq.prepare.layer_table import layer_table, set_phase_
from nipq.prepare.prepare import prepare_
from nipq.ptq.report import QuantizationReport, Stage
from nipq.ptq.samples import Batch, Samples, part, read_samples
from nipq.qat.batchnorm import batchnorms, reestimate_bn_, reestimate_bn_if_better_
from nipq.qat.calibrate import calibrate_
from nipq.qat.optim import param_groups
from nipq.qat.session import QATSession
from nipq.report.summary import summary
from nipq.verify.api import Artifact, verify
from nipq.verify.result import VerifyResult

#: Settings of post-training quantization: clipping ranges of weights per output channel, and the defaults.
CONFIG = Config(granularity="channel")

#: Learning rate of AdamW for weights and ranges. Ten times as much served a small network for digits better, and
#: ruined a pretrained EfficientNet-Lite0 within 32 steps; see experiments/post_training/README.md.
LR = 1e-4

#: Finds the inputs in the pairs that samples are kept as.
_first = itemgetter(0)

#: Number of measurements of sensitivities: in the middle of the range or at one width, then at the first assignment.
ROUNDS = 2


@dataclass(frozen=True)
class QuantizedModel:
    """Result of :func:`quantize`.

    Attributes:
        model: the trained form: a prepared copy of the model, bit-widths frozen, in evaluation mode and phase
            ``"round"``. It can be trained on, or given to :func:`nipq.verify`.
        report: what each stage gained and what the result costs; prints itself.
        example_inputs: a batch that the model was called with, which export traces.
    """

    model: nn.Module
    report: QuantizationReport
    example_inputs: ExampleInputs = field(repr=False)

    @cached_property
    def deployed(self) -> nn.Module:
        """The deployed form with integer weights, see :func:`nipq.convert`; made at the first use."""
        return convert(self.model)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the packed file, see :func:`nipq.save`.

        Args:
            path: the file, by custom ``*.nipq.safetensors``.
            overwrite: replace an existing file.
        """
        return save(self.deployed, path, overwrite=overwrite)

    def export(self, path: str | Path, **settings: Any) -> ExportReport:  # noqa: ANN401  (those of nipq.export)
        """Write a file for other programs, see :func:`nipq.export`.

        Args:
            path: the file; its end says the format, such as ``.onnx``.
            **settings: ``format``, ``pack`` or ``overwrite``.
        """
        return export(self.deployed, path, self.example_inputs, **settings)

    def verify(self, loader: Iterable[Any], *artifacts: Artifact, **settings: Any) -> VerifyResult:  # noqa: ANN401
        """Compare the deployed form, and files, with the trained form, see :func:`nipq.verify`.

        Args:
            loader: batches of real data.
            *artifacts: files that :meth:`save` or :meth:`export` wrote.
            **settings: ``file`` or ``metric``.
        """
        return verify(self.model, self.deployed, *artifacts, loader=loader, **settings)

    def __str__(self) -> str:
        """The report."""
        return str(self.report)


@torch.inference_mode(mode=False)  # whatever the caller's mode is, sensitivities are gradients
@torch.enable_grad()
def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Budget | None = None,
    *,
    config: Config | None = None,
    example_inputs: ExampleInputs | None = None,
    samples: int = 256,
    epochs: int = 0,
    loss_fn: LossFn | None = None,
    lr: float | None = None,
    seed: int = 0,
    inputs: Inputs | None = None,
    progress: Callable[[str], None] | None = None,
) -> QuantizedModel:
    """Quantize a trained float model within a budget, from a few hundred unlabelled samples.

    ::

        result = nipq.quantize(model, loader, nipq.AverageBits(weights=4, activations=8))
        print(result.report)
        result.save("model.nipq.safetensors")

    The model is copied and not changed in any way, its mode and device included. No labels are needed: every stage is
    judged by how near it brings the outputs to the float model's own, on the last quarter of the samples, which nothing
    else sees.

    Args:
        model: a trained float model that :func:`nipq.prepare_` takes.
        loader: batches: tensors, ``(inputs, targets)``, or mappings of keyword inputs. Read once without training. A
            model with several inputs finds them by ``example_inputs``, or else by the arguments of its forward.
        budget: limits on the result; None gives every tensor the most bits that the config allows (8 by default).
        config: settings of ``prepare_``; the default is :data:`CONFIG`.
        example_inputs: what ``prepare_`` traces the model with; the first sample if left out.
        samples: how many samples to read for all measurements.
        epochs: passes over the whole loader to train afterwards, with AdamW at :data:`LR` and a cosine.
        loss_fn: loss of outputs and targets to train with; if left out, the distance from the float model's outputs,
            and no targets are needed.
        lr: learning rate of the training, if not the default's.
        seed: of the noise, and of the training.
        inputs: function from a batch to what the model is called with, where the form of ``example_inputs`` does
            not say it; see :class:`nipq.prepare.batches.BatchReader`.
        progress: called with the name of each stage when it begins.

    Returns:
        The quantized model in both forms, with its report.

    Raises:
        OrderError: if the model is prepared or deployed already.
        BudgetError: if no allowed bit-widths keep the budget.
        NotQuantizableError: if ``prepare_`` refuses a layer.
        ConfigError: if there are no samples, all are equal, or ``loss_fn`` returns no scalar.
        NonFiniteError: if samples, outputs or the loss hold NaN or infinity.
    """
    started = time.perf_counter()
    _check_model(model)
    if epochs < 0:
        raise ConfigError(f"quantize: expected epochs of 0 or more, found {epochs}.")
    if epochs and any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ConfigError(
            f"{type(model).__name__}: expected parameters in float32 or bfloat16 to train, found float16, in which "
            "AdamW divides by zero. Give model.float(), or leave epochs out."
        )
    if epochs:
        check_rereadable(loader, "quantize")
    reader = BatchReader(model, inputs, "quantize", example_inputs)
    found = read_samples(loader, samples, reader, targets=loss_fn is not None)
    device = next(model.parameters()).device
    if example_inputs is None:
        example_inputs = to_device(reader.cut(found.fit[0][0], 0, 1), device)
    student = copy_of(model).eval()
    float_bytes = sum(tensor.nbytes for tensor in (*student.parameters(), *student.buffers()))
    _check_outputs(student, part(found.fit[0], 0, 2, reader), loss_fn, device, reader)
    prepare_(student, example_inputs, config or CONFIG)
    set_phase_(student, Phase.ROUND)
    if budget is not None:
        check_feasible(student, budget)
    stages = _Stages(student, found, seed, progress or (lambda _name: None))
    stages.bits(budget)
    stages.batchnorm()
    if epochs:
        teacher = copy_of(model).eval()
        student = stages.train(teacher, loader, budget, epochs=epochs, loss_fn=loss_fn, lr=lr, reader=reader)
    set_phase_(student.eval(), Phase.ROUND)
    deployed = convert(student)
    total = summary(student)
    report = QuantizationReport(
        model=type(model).__name__,
        stages=tuple(stages.stages),
        weight_bits=total.weight_bits,
        activation_bits=total.activation_bits,
        file_bytes=file_bytes(deployed),
        float_bytes=float_bytes,
        limits=() if budget is None else tuple(costs(student, budget)),
        fit_samples=found.fit_count,
        held_out_samples=found.held_out_count,
        seconds=time.perf_counter() - started,
    )
    result = QuantizedModel(student, report, example_inputs)
    result.__dict__["deployed"] = deployed  # what the property would make again
    return result


class _Stages:
    """The stages of one quantization, on a prepared model.

    Args:
        model: a prepared copy of the float model, in evaluation mode.
        samples: to measure and to judge with.
        seed: of the noise.
        progress: called with the name of each stage.
    """

    def __init__(self, model: nn.Module, samples: Samples, seed: int, progress: Callable[[str], None]) -> None:
        self.model, self.samples, self.seed, self.progress = model, samples, seed, progress
        self.judge = OutputJudge(model, samples.held_out, inputs=_first)
        self.stages: list[Stage] = []

    def bits(self, budget: Budget | None) -> None:
        """Clipping ranges at one width for all tensors, mixed bits where they are nearer to float; freezes."""
        table = BitTable(layer_table(self.model))
        most = [choices[-1] for choices in table.choices]
        learned = any(not quantizer.is_frozen for quantizer in table.quantizers)
        widths = uniform_bits(self.model, budget) if budget is not None and learned else most
        self._stage("ranges", lambda: self._start(table, widths), note=_described(table, widths))
        best = widths
        if budget is not None and learned and widths != most:
            nearest = self._corrected()
            for number in range(ROUNDS):
                self._stage(f"mixed bits, round {number + 1}", lambda: self._allocate(budget))
                distance = self._corrected()
                self._keep_last(kept=distance < nearest)
                if distance < nearest:
                    best, nearest = _widths(table), distance
        freeze_to_(self.model, best)
        if best != widths or len(self.stages) > 1:
            self._calibrate()  # ranges belong to bit-widths

    def batchnorm(self) -> None:
        """Batch-norm statistics, where that brings outputs nearer."""
        if not batchnorms(self.model):
            return
        started = time.perf_counter()
        self.progress("batch norms")
        choice = reestimate_bn_if_better_(self.model, self.samples.fit, self.samples.held_out, inputs=_first)
        tried = min((name for name in choice.distances if name != "none"), key=choice.distances.__getitem__)
        judged = self.judge.judge() if choice.kept != "none" else Judgement(choice.distances[tried], None)
        kept, seconds = choice.kept != "none", time.perf_counter() - started
        self.stages.append(Stage("batch norms", judged.distance, judged.agreement, kept, seconds, tried))

    def train(
        self,
        teacher: nn.Module,
        loader: Iterable[Any],
        budget: Budget | None,
        *,
        epochs: int,
        loss_fn: LossFn | None,
        lr: float | None,
        reader: BatchReader,
    ) -> nn.Module:
        """Train at the chosen bits; without ``loss_fn`` what was there before is kept if it was nearer to float."""
        before = copy_of(self.model)
        nearest = next(stage.distance for stage in reversed(self.stages) if stage.kept)
        note = f"{epochs} epoch{'s' if epochs > 1 else ''} {'towards float' if loss_fn is None else 'by loss_fn'}"
        settings: dict[str, Any] = {"epochs": epochs, "loss_fn": loss_fn, "lr": lr, "seed": self.seed}
        self._stage("training", lambda: _train_(self.model, teacher, loader, budget, reader, **settings), note=note)
        self._keep_last(kept=loss_fn is not None or self.stages[-1].distance < nearest)
        return self.model if self.stages[-1].kept else before

    def _stage(self, name: str, act: Callable[[], object], note: str = "") -> None:
        """Do something and judge it."""
        self.progress(name)
        started = time.perf_counter()
        act()
        judged = self.judge.judge()
        seconds = time.perf_counter() - started
        self.stages.append(Stage(name, judged.distance, judged.agreement, kept=True, seconds=seconds, note=note))

    def _keep_last(self, *, kept: bool) -> None:
        self.stages[-1] = replace(self.stages[-1], kept=kept)

    def _corrected(self) -> float:
        """Distance that the model would have with batch-norm statistics moved, which comes next."""
        if not batchnorms(self.model):
            return self.stages[-1].distance
        update = reestimate_bn_(self.model, self.samples.fit, statistics="relative", inputs=_first)
        distance = min(self.judge.distance(), self.stages[-1].distance)
        update.undo()
        return distance

    def _start(self, table: BitTable, widths: list[int]) -> None:
        set_learned_bits_(table, widths)
        self._calibrate()

    def _allocate(self, budget: Budget) -> None:
        fit = self.samples.fit
        allocate_bits_(self.model, fit, budget, batches=len(fit), seed=self.seed, whole=True, inputs=_first)
        self._calibrate()

    def _calibrate(self) -> None:
        calibrate_(self.model, self.samples.fit, len(self.samples.fit), inputs=_first)


def _widths(table: BitTable) -> list[int]:
    return [quantizer.bits_rounded for quantizer in table.quantizers]


def _described(table: BitTable, widths: list[int]) -> str:
    """The commonest bit-widths of weights and of inputs."""
    parts = widths[: len(table.weights)], widths[len(table.weights) :]
    names = ["/".join(str(max(set(part), key=part.count)) for part in parts if part)]
    return f"{names[0]} bits"


def _check_model(model: nn.Module) -> None:
    check_module(model, "quantize")
    name = type(model).__name__
    if any(is_prepared(module) for module in model.modules()) or deployed_layers(model):
        raise OrderError(
            f"{name}: expected a float model, found one that is quantized already. "
            "Give the float model; nipq.restore_(model) takes the quantizers off a prepared one."
        )
    if next(model.parameters(), None) is None:
        raise ConfigError(f"{name}: expected a model with parameters, found none. Give a trained model.")
    learned = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if bool(tensor.isnan().any()) or (key in learned and bool(tensor.isinf().any())):  # masks may hold infinity
            raise NonFiniteError(f"{key}: expected finite numbers, found NaN or infinity. Give a trained model.")


def _check_outputs(
    model: nn.Module, few: Batch, loss_fn: LossFn | None, device: torch.device, reader: BatchReader
) -> None:
    """Try the float model, and the loss function if there is one, on few samples."""
    inputs, targets = to_device(few[0], device), to_device(few[1], device)
    with torch.set_grad_enabled(loss_fn is not None):
        outputs = reader.call(model, inputs)
    check_outputs(model, floats_in(outputs))
    if loss_fn is None:
        return
    learns = any(parameter.requires_grad for parameter in model.parameters())  # else clipping ranges alone will
    loss_of(loss_fn if learns else lambda *given: _leaf(loss_fn(*given)), outputs, targets)


def _leaf(loss: Any) -> Any:  # noqa: ANN401  (whatever a loss function returns)
    return loss.detach().requires_grad_() if isinstance(loss, Tensor) else loss


def _train_(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    budget: Budget | None,
    reader: BatchReader,
    *,
    epochs: int,
    loss_fn: LossFn | None = None,
    lr: float | None = None,
    seed: int = 0,
) -> None:
    """Train a quantized model with frozen bits, in place, by a QAT session with settings that need no tuning.

    Weights and clipping ranges are trained with fake quantization (rounding with the straight-through estimator), by
    AdamW and the session's cosine. Batch norms keep their statistics: those of a few calibration samples are worse than
    the ones that the network came with. It ends in evaluation mode.

    Args:
        model: a prepared model with frozen bits and calibrated ranges.
        teacher: the float model in evaluation mode, whose outputs are the targets where there is no ``loss_fn``.
        loader: batches, read once an epoch.
        budget: the limits, which the frozen bits keep.
        reader: finds inputs and targets in a batch.
        epochs: passes over the loader.
        loss_fn: of outputs and targets; if left out, the distance from the teacher's outputs.
        lr: learning rate; :data:`LR` if left out.
        seed: of torch's generators meanwhile, which are restored.

    Raises:
        NonFiniteError: if the loss is not finite.
        ConfigError: if ``loss_fn`` returns no scalar.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.0), lr=lr or LR)
    norms = batchnorms(model).values()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        steps = epochs * _batches_in(loader)
        session = QATSession(model, budget, steps, optimizer=optimizer, finetune=1.0, batchnorm_batches=0)
        torch.manual_seed(seed)
        model.train()
        for norm in norms:
            norm.eval()
        for _ in range(epochs):
            for where, batch in reader.read(loader):
                inputs = to_device(reader.inputs(batch, where), device)
                outputs = reader.call(model, inputs, where)
                if loss_fn is None:
                    with torch.no_grad():
                        truth = floats_in(call_model(teacher, inputs))
                    loss = output_distance(outputs, truth)
                else:
                    loss = loss_of(loss_fn, outputs, to_device(reader.targets(batch, where), device), where)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"training: expected a finite loss, found {float(loss.detach())} at step {session.steps}. "
                        "Lower lr."
                    )
                (loss + session.penalty()).backward()  # type: ignore[no-untyped-call]  # torch gives it no type
                optimizer.step()
                optimizer.zero_grad()
                session.step()
    session.finish()


def _batches_in(loader: Iterable[Any]) -> int:
    """Batches of one pass; counted where the loader does not know."""
    if isinstance(loader, Sized):
        try:
            return len(loader)
        except TypeError:  # a DataLoader over an iterable without a length
            pass
    return sum(1 for _ in batches_of(loader, "quantize"))
