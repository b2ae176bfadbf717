"""Deployed modules, from ``nipq.convert`` or ``nipq.load``, and compiled models of runtimes as candidates.

A deployed module is checked at every level, down to the last bit. A compiled model is checked for its kernels (E0) and
on the task (E2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nipq.errors import ConfigError, FileFormatError
from nipq.export.packed_read import load
from nipq.export.packed_write import file_bytes
from nipq.export.runtimes import CompiledModel
from nipq.nn.deployed import (
    Deployed,
    DeployedKeptLayer,
    DeployedLayer,
    DeployedProduct,
    DeployedWeightOnlyLayer,
    deployed_layers,
    deployed_products,
    full_name,
)
from nipq.nn.integer import bias_of, fold
from nipq.nn.kinds import is_plain, output_channels
from nipq.nn.layers import float_weight
from nipq.prepare.batches import copy_of
from nipq.prepare.layer_table import OPERANDS, LayerRow, layer_table, weight_table
from nipq.prepare.prepare import restore_
from nipq.prepare.teacher_forcing import BrokenLayerError, run_teacher_forced
from nipq.verify.candidate import Candidate, differences
from nipq.verify.metrics import exact_check, flips_in, layer_check, logits_of
from nipq.verify.reference import ReferenceRun, compare_codes, recording_codes, run_model
from nipq.verify.result import Check


class DeployedCandidate(Candidate):
    """A deployed module, and its packed file if it has one.

    Args:
        name: name of the artifact in the result.
        module: the deployed module.
        layers: quantization points, layers and products of the trained model.
        model: the trained model.
        file: the packed file of the module.
        is_file: whether the module was read from that file.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Iterable[str],
        model: nn.Module,
        file: Path | None = None,
        *,
        is_file: bool = False,
    ) -> None:
        super().__init__(name, module, layers, is_file=is_file)
        self.deployed, self.model, self.file = module, model, file
        self.failure: str | None = None

    def static_check(self) -> Check:
        """Level E0: every number of the module, and the packed file."""
        found = list(trained_differences(self.model, self.deployed))
        numbers: dict[str, Any] = {"layers": len(deployed_layers(self.deployed))}
        if products := deployed_products(self.deployed):
            numbers["products"] = len(products)
        if self.file is not None:
            numbers["bytes_promised"] = file_bytes(self.deployed)
            try:
                loaded = load(self.file, restore_(copy_of(self.model)))
                numbers["bytes_found"] = self.file.stat().st_size
                if numbers["bytes_found"] != numbers["bytes_promised"]:
                    found.append(
                        f"{self.file.name}: {numbers['bytes_found']:,} bytes, promised {numbers['bytes_promised']:,}"
                    )
                found += file_differences(self.deployed, loaded)
            except FileFormatError as error:
                found.append(str(error))
        numbers["differences"] = len(found)
        claim = "integers, scales, zero points, limits" + ("; the file" if self.file is not None else "")
        return Check("E0 static", claim, not found, numbers, found[0] if found else None)

    def compare(self, reference: ReferenceRun) -> None:
        """Run the model on one piece of data and add the differences found, until a layer fails to run."""
        if self.failure is None:
            try:
                super().compare(reference)
            except BrokenLayerError as error:
                self.failure = str(error)

    def logits(self, reference: ReferenceRun) -> Tensor:
        """Logits, with the layers compared for E1 and E3 on the way."""
        run_teacher_forced(self.deployed, reference.calls, self.layers, partial(run_model, inputs=reference.inputs))
        with recording_codes(self.deployed) as codes:
            found = logits_of(run_model(self.deployed, reference.inputs), reference.place)
        compare_codes(reference.codes, codes, self.layers)
        return found

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """E1, E2 and E3."""
        if self.failure is not None:
            return [Check("E1 layers", "each layer on the trained inputs", False, {}, self.failure)]
        return [
            layer_check(self.layers),
            self.output.check(scores, flips_in(self.layers)),
            exact_check(self.layers, self.output.exact),
        ]


class CompiledCandidate(Candidate):
    """A model that a runtime compiled. Its numbers are the file's; its layers cannot be cut apart.

    Args:
        module: the compiled model.
        layers: quantization points, layers and products of the trained model.
    """

    def __init__(self, module: CompiledModel, layers: Iterable[str]) -> None:
        super().__init__(module.runtime, module, layers)
        self.compiled = module

    def static_check(self) -> Check:
        """Level E0: every layer that can be is computed in integers."""
        missing, kernels = self.compiled.float_layers(), self.compiled.kernels
        numbers = {"layers": len(kernels), "integer_kernels": sum(kernel.integer for kernel in kernels)}
        first = next((f"{kernel.name}: {kernel.what}" for kernel in kernels if kernel.name in missing), None)
        return Check("E0 static", "integer kernels", first is None, numbers, first)

    def checks(self, scores: Mapping[str, float]) -> list[Check]:
        """E2."""
        return [self.output.check(scores)]


def module_candidate(artifact: nn.Module, layers: Iterable[str], model: nn.Module, file: Path | None) -> Candidate:
    """The candidate for a deployed or compiled model, and for the packed file that is to be checked with it.

    Raises:
        ConfigError: if the module holds no deployed layer.
    """
    if isinstance(artifact, CompiledModel):
        return CompiledCandidate(artifact, layers)
    if not deployed_layers(artifact):
        raise ConfigError(
            f"verify: expected a deployed {type(model).__name__}, found a {type(artifact).__name__} without deployed "
            "layers. Give what nipq.convert or nipq.load returned."
        )
    return DeployedCandidate("deployed model", artifact, layers, model, file)


def packed_candidate(path: Path, layers: Iterable[str], model: nn.Module) -> Candidate:
    """The candidate for a packed file.

    Raises:
        FileFormatError: if the file cannot be loaded.
    """
    loaded = load(path, restore_(copy_of(model)))
    return DeployedCandidate(path.name, loaded, layers, model, path, is_file=True)


def trained_differences(model: nn.Module, deployed: nn.Module) -> Iterator[str]:
    """Compare every number of the deployed model with the trained one, bit for bit (E0).

    Yields:
        One sentence per difference, in the order of execution, with the layer's full name.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = deployed_layers(deployed)
    rows = {names[row.layer]: row for row, _ in weight_table(model)}
    for name, row in rows.items():
        if name not in layers:
            yield f"{name}: the trained model quantizes this layer, the deployed one does not"
        else:
            yield from differences(name, _trained_facts(row), _deployed_facts(layers[name]))
    for name in (name for name in layers if name not in rows):
        yield f"{name}: the deployed model quantizes this layer, the trained one does not"
    products = deployed_products(deployed)
    trained = {names[row.layer]: row for row in layer_table(model) if row.spec.is_product}
    for name in dict.fromkeys((*trained, *products)):
        ours = {} if name not in trained else _trained_operands(trained[name])
        theirs = {} if name not in products else _deployed_operands(products[name])
        yield from differences(name, ours, theirs)
    gone = [*rows, *trained, *(names[row.batchnorm] for row in rows.values() if row.input and row.batchnorm)]
    yield from differences("", _outside(model, gone), _outside(deployed, [*layers, *products]))


def file_differences(deployed: nn.Module, loaded: nn.Module) -> Iterator[str]:
    """Compare every number of a model read from its file with the model that was saved, bit for bit (E0).

    Yields:
        One sentence per difference, with the layer's full name.
    """
    saved, back = deployed_layers(deployed), deployed_layers(loaded)
    for name in sorted(saved.keys() ^ back.keys()):
        yield f"{name}: only one of the deployed model and its file has this layer"
    for name in (name for name in saved if name in back):
        yield from differences(name, _deployed_facts(saved[name]), _deployed_facts(back[name]), "saved", "in the file")
    products, again = deployed_products(deployed), deployed_products(loaded)
    for name in dict.fromkeys((*products, *again)):
        one, other = (_deployed_operands(part[name]) if name in part else {} for part in (products, again))
        yield from differences(name, one, other, "saved", "in the file")
    ours, theirs = _outside(deployed, [*saved, *products]), _outside(loaded, [*back, *again])
    yield from differences("", ours, theirs, "saved", "in the file")


def _trained_operands(row: LayerRow) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for part, quantizer in zip(OPERANDS, (row.input, row.weight), strict=True):
        assert quantizer is not None
        low, high = quantizer.code_range()
        whole = (quantizer.bits_rounded, int(quantizer.zero_point()), int(low), int(high))
        facts |= _operand(part, quantizer.step(), quantizer.grid.kind, whole)
    return facts


def _deployed_operands(product: DeployedProduct) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for part, operand in product.operands().items():
        whole = (operand.bits, operand.zero_point, operand.code_low, operand.code_high)
        facts |= _operand(part, operand.step, operand.grid, whole)
    return facts


def _operand(part: str, step: Tensor, grid: str, whole: tuple[int, int, int, int]) -> dict[str, Any]:
    names = ("bits", "zero point", "lowest code", "highest code")
    return {f"{part}: step": step, f"{part}: grid": grid} | {
        f"{part}: {name}": number for name, number in zip(names, whole, strict=True)
    }


def _trained_facts(row: LayerRow) -> dict[str, Any]:
    """Facts that the deployed layer must hold, taken from the trained layer's quantizers."""
    bias = bias_of(row.layer)
    facts: dict[str, Any] = {
        "weight bits": row.weight.bits_rounded,
        "grid of the weight": row.weight.grid.kind,
        "weight codes": row.weight.codes(float_weight(row.layer)),
    }
    kept = row.spec.form == "kept"
    if row.input is None or kept:
        facts |= {"step of the weight": row.weight.step(), "bias": bias}
    if kept or not is_plain(row.layer):
        facts |= _own_state(row.layer)
    if row.input is None:
        return facts
    step, (low, high) = row.input.step(), row.input.code_range()
    facts |= {
        "input bits": row.input.bits_rounded,
        "grid of the input": row.input.grid.kind,
        "zero point": int(row.input.zero_point()),
        "lowest code": int(low),
        "highest code": int(high),
        "step of the input": step,
    }
    if kept:
        return facts
    scale, offset = fold(step, row.weight.step(), bias, row.batchnorm, output_channels(row.layer))
    return facts | {"scale": scale, "offset": offset}


def _own_state(layer: nn.Module) -> dict[str, Tensor]:
    """State of a layer with a forward of its own beside weight, bias and quantizers."""
    ours = ("parametrizations.", "quantization.", "weight", "bias")
    state = {key: value for key, value in layer.state_dict().items() if isinstance(value, Tensor)}
    return {key: value for key, value in state.items() if not key.startswith(ours)}


def _deployed_facts(layer: Deployed) -> dict[str, Any]:
    """The same facts as in :func:`_trained_facts`, as the deployed layer holds them."""
    facts: dict[str, Any] = {
        "weight bits": layer.weight_bits,
        "grid of the weight": layer.weight_grid,
        "weight codes": layer.weight_codes,
    }
    if isinstance(layer, DeployedWeightOnlyLayer):
        facts |= {"step of the weight": layer.scale, "bias": layer.bias}
    if not is_plain(layer.layer):
        facts |= _own_state(layer.layer)
    if not isinstance(layer, (DeployedLayer, DeployedKeptLayer)) or layer.input_step is None:
        return facts
    facts |= {
        "input bits": layer.input_bits,
        "grid of the input": layer.grid,
        "zero point": layer.zero_point,
        "lowest code": layer.code_low,
        "highest code": layer.code_high,
        "step of the input": layer.input_step,
    }
    return facts | {"scale": layer.scale, "offset": layer.offset} if isinstance(layer, DeployedLayer) else facts


def _outside(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of the model's state outside of the named modules, each once, under its first name."""
    gone = {part for name in names for part in model.get_submodule(name).modules()}
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for key, value in ({} if module in gone else module._parameters | module._buffers).items():
            if value is not None and id(value) not in seen and key not in module._non_persistent_buffers_set:
                seen.add(id(value))
                found[full_name(name, key)] = value.detach()
    return found
