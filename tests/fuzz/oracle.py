"""Take a random network through the whole path, and judge whether it ended right, was refused, or went wrong."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import nipq
from nipq.errors import NipqError
from nipq.prepare.batches import call_model
from nipq.prepare.layer_table import quantizers, set_phase_
from nipq.prepare.teacher_forcing import float_results
from tests.fuzz.networks import Network

#: Distance of the deployed model from the trained one, relative to the largest value, that float sums explain.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.1}


@dataclass
class Outcome:
    """Outcome of a network.

    Attributes:
        verdict: right, refused before training, or a fault.
        stage: where it ended.
        reason: the message of a refusal or a fault.
        distance: largest relative distance of a result.
    """

    verdict: Literal["right", "refused", "fault"]
    stage: str
    reason: str = ""
    distance: float = 0.0


def outcome(network: Network, *, export: bool = False) -> Outcome:
    """Inspect, prepare, calibrate, train, freeze, deploy, save, load and verify a network.

    Args:
        network: from ``tests.fuzz.networks``.
        export: also write it as ONNX and check the file.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        return _outcome(network, Path(folder), export)


def _outcome(network: Network, folder: Path, export: bool) -> Outcome:
    model, inputs, stage = network.build(), network.inputs, "inspect"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        nipq.inspect(model, inputs, network.config)
        stage = "validate"
        refusals = [finding for finding in nipq.validate(model, inputs, network.config) if finding.severity == "error"]
        stage = "prepare"
        nipq.prepare_(model, inputs, network.config)
    except NipqError as error:
        same = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        return Outcome("refused", stage, str(error)) if same else Outcome("fault", stage, "refused, but changed")
    except Exception as error:
        return Outcome("fault", stage, repr(error))
    if refusals:
        return Outcome("fault", stage, f"validate refuses what prepare_ takes: {refusals}")
    try:
        stage = "restore"
        restored = nipq.restore_(copy.deepcopy(model))
        if any(not torch.equal(value, state[key]) for key, value in restored.state_dict().items()):
            return Outcome("fault", stage, "the float model came back otherwise")
        stage = "train"
        _train(model, network)
        stage = "convert"
        deployed = nipq.convert(model)
        stage = "run"
        apart, results = _distance(model, deployed, inputs)
        stage = "save"
        file = nipq.save(deployed, folder / "model.nipq.safetensors")
        loaded = nipq.load(file, network.build())
        again = float_results(call_model(loaded, _fresh(inputs)))
        if not all(torch.equal(one, other) for one, other in zip(results, again, strict=True)):
            return Outcome("fault", stage, "the loaded model computes something else", apart)
        stage = "verify"
        files = [file]
        if export:
            files += _exported(deployed, folder / "model.onnx", inputs)
        proof = nipq.verify(model, deployed, *files, loader=[network.batch])
        if not proof:
            return Outcome("fault", stage, str(proof.first_difference), apart)
        if not apart <= CLOSE[network.dtype] and not _flipped(proof):
            return Outcome("fault", stage, f"{apart:.3g} apart without a code that flipped", apart)
    except Exception as error:
        return Outcome("fault", stage, repr(error))
    return Outcome("right", stage, "", apart)


def _exported(deployed: nn.Module, path: Path, inputs: Any) -> list[Path]:
    """The ONNX file, or nothing where it is refused by name: types and results that torch's exporter does not know."""
    try:
        return [nipq.export(deployed, path, inputs).path]
    except NipqError:
        return []


def _train(model: nn.Module, network: Network) -> None:
    nipq.calibrate_(model, [network.batch] * 2)
    learned = any(not quantizer.is_frozen for quantizer in quantizers(model))
    optimizer = torch.optim.SGD(nipq.param_groups(model, lr=1e-3), lr=1e-3)
    model.train()
    for phase in ("noise", "noise", "round"):
        if phase == "round":
            if learned:
                nipq.freeze_bits_(model, nipq.AverageBits(weights=5))
            set_phase_(model, "round")
        loss = sum(
            result.float().square().mean() for result in float_results(call_model(model, _fresh(network.inputs)))
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if phase == "round" and any(isinstance(module, _BatchNorm) for module in model.modules()):
            nipq.reestimate_bn_(model, [network.batch] * 2)
    model.eval()


def _distance(model: nn.Module, deployed: nn.Module, inputs: Any) -> tuple[float, list[Tensor]]:
    with torch.no_grad():
        trained = float_results(call_model(model, _fresh(inputs)))
        found = float_results(call_model(deployed, _fresh(inputs)))
    pairs = list(zip(trained, found, strict=True))
    return max(float((one - other).abs().max() / one.abs().max().clamp(min=1e-12)) for one, other in pairs), found


def _flipped(proof: Any) -> bool:
    return any(check.numbers.get("flips", 0) for check in proof.checks if check.name.startswith("E1"))


def _fresh(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.clone()
    if isinstance(inputs, dict):
        return {key: value.clone() for key, value in inputs.items()}
    return tuple(value.clone() for value in inputs)
