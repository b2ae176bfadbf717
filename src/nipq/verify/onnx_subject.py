"""An ONNX file, portable or QONNX: static, layer by layer and on the task, in ONNX Runtime's faithful mode."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nipq.errors import FileFormatError
from nipq.export.modules import deployed_layers
from nipq.export.onnx_cells import cells, operands
from nipq.export.onnx_file_verify import read_onnx
from nipq.export.portable import portable_layers, portable_products
from nipq.export.session import faithful_session
from nipq.prepare.places import place_of
from nipq.prepare.trace import ExampleInputs
from nipq.verify.candidate import Subject
from nipq.verify.evidence import flips_in, layer_rung
from nipq.verify.onnx_forced import Probe, forced, runnable
from nipq.verify.onnx_static import expected_facts, input_facts, onnx_differences, promised_file, weight_bytes
from nipq.verify.reference import Observation
from nipq.verify.result import Rung

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


class OnnxModule(nn.Module):
    """A session that is called like the model it was exported from.

    Args:
        session: an ONNX Runtime session.
        path: of its file, for messages.
    """

    def __init__(self, session: InferenceSession, path: Path) -> None:
        super().__init__()
        self.session, self.path = session, path

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:  # noqa: ANN401  (the model's own arguments)
        """All outputs; one that is alone as it is.

        Args:
            *args: the model's arguments; whatever is no tensor lies in the graph.
            **kwargs: the same by name.

        Raises:
            FileFormatError: if the runtime cannot run the file on them.
        """
        outputs = [
            torch.from_numpy(value) for value in run(self.session, arrays(self.session, args, kwargs), self.path)
        ]
        return outputs[0] if len(outputs) == 1 else outputs


def arrays(session: InferenceSession, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """A call's tensors by the names of a session's inputs.

    Args:
        session: an ONNX Runtime session.
        args: the model's arguments, in the order of the inputs.
        kwargs: the same by name.
    """
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (value for value in args if isinstance(value, Tensor)), strict=False))
    given |= {key: value for key, value in kwargs.items() if key in names}
    return {key: value.detach().cpu().numpy() for key, value in given.items()}


def run(session: InferenceSession, feed: dict[str, NDArray[Any]], path: Path, outputs: Any = None) -> Any:  # noqa: ANN401
    """Run a session.

    Args:
        session: an ONNX Runtime session.
        feed: inputs by name.
        path: of the file, for messages.
        outputs: names of what is wanted; everything if None.

    Raises:
        FileFormatError: if the runtime fails.
    """
    try:
        return session.run(outputs, feed)
    except Exception as error:  # the runtime's exceptions share no base class
        shapes = {name: value.shape for name, value in feed.items()}
        raise FileFormatError(
            f"{path}: expected a file that runs on inputs of shape {shapes}, found: {error}. Export the model again, "
            "with an example of at least two samples, or give batches of the example's size."
        ) from error


class OnnxSubject(Subject):
    """A file that ``nipq.export`` wrote.

    Args:
        path: the file.
        deployed: what ``nipq.convert`` makes of the trained model, on the CPU.
        layers: full names of the trained layers.
        example: one batch.

    Raises:
        FileFormatError: if it cannot be read.
        MissingDependencyError: if a package that reads or runs it is not installed.
    """

    def __init__(self, path: Path, deployed: nn.Module, layers: Iterable[str], example: ExampleInputs) -> None:
        self.path, self.deployed, self.example = path, deployed, example
        self.failure: str | None = None
        self.file = read_onnx(path)
        try:
            self.cells, self.operands = cells(self.file), operands(self.file)
            whole = runnable(self.file)
            model, self.probes = forced(self.file, self.cells, self.operands)
        except FileFormatError:
            raise
        except (LookupError, ValueError, TypeError, RuntimeError, OverflowError, StopIteration) as error:
            # Nodes may lack anything that nodes have.
            raise FileFormatError(
                f"{path}: expected a sound graph, found: {error!r}. Export or copy the model again."
            ) from error
        super().__init__(path.name, OnnxModule(self._session(whole), path), layers, is_file=True)
        # What is forced has the sizes of the trained model's tensors, of which the graph's own sizes know nothing.
        self.forced = self._session(model, reuse_memory=False)
        for cell in (*self.cells, *self.operands):
            if cell.name in self.evidence:
                evidence = self.evidence[cell.name]
                evidence.levels = cell.facts.get("highest code", 0) - cell.facts.get("lowest code", 0)
                # QONNX adds the zero point before it rounds: a tie or a long sum may fall to the other side.
                evidence.inexact = self.file.form == "qonnx" and cell.facts.get("zero point", 0) != 0

    def _session(self, model: ModelProto, *, reuse_memory: bool = True) -> InferenceSession:
        """A faithful session of what was checked, not of what lies on the disk by now."""
        return faithful_session(model.SerializeToString(), name=str(self.path), reuse_memory=reuse_memory)

    def static(self) -> Rung:
        """Rung E0: integers, scales, zero points and limits of the graph itself, and bytes of the weights."""
        layers, numbers, form = deployed_layers(self.deployed), portable_layers(self.deployed), self.file.form
        facts = {name: expected_facts(layer, numbers[name], form) for name, layer in layers.items()}
        products = portable_products(self.deployed)
        for name, product in products.items():
            facts |= {place_of(name, part): input_facts(given, form) for part, given in product.items()}
        expected = {place: facts[place] for place in self.evidence if place in facts}
        found = list(onnx_differences([*self.cells, *self.operands], expected))
        promised, stored = weight_bytes(self.file, numbers, self.file.form)
        if stored > promised:
            found.append(f"{stored:,} bytes of weights, promised {promised:,}")
        size, whole = self.path.stat().st_size, None if found else promised_file(self.file, self.deployed, self.example)
        if whole is not None and size > whole:
            found.append(f"{size:,} bytes on disk, promised {whole:,}")
        counted = {
            "layers": len({cell.name for cell in self.cells}),
            **({"products": len(products)} if products else {}),
            **({} if whole is None else {"bytes_promised": whole}),
            "bytes_found": size,
            "weight_bytes_promised": promised,
            "weight_bytes_found": stored,
            "differences": len(found),
        }
        claim = "integers, scales, zero points, limits of the graph"
        return Rung("E0 static", claim, not found, counted, found[0] if found else None)

    def observe(self, seen: Observation) -> None:
        """Add one piece of data to the evidence, until the file fails to run.

        Args:
            seen: the trained model on it.
        """
        if self.failure is None:
            try:
                super().observe(seen)
            except FileFormatError as error:
                self.failure, self.module = str(error), None

    def run(self, seen: Observation) -> Tensor:
        """Logits, with the evidence for E1 on the way.

        Args:
            seen: the trained model on the same data.
        """
        self._force(seen)
        return super().run(seen)

    def _force(self, seen: Observation) -> None:
        inputs, done = seen.inputs, defaultdict[str, int](int)
        args, kwargs = (
            ((), inputs) if isinstance(inputs, Mapping) else ([inputs] if isinstance(inputs, Tensor) else inputs, {})
        )
        feed = arrays(self.forced, args, kwargs)
        for probe in self.probes:
            if probe.forced is None:
                continue
            calls = seen.calls.inputs.get(probe.name, [])
            if done[probe.name] >= len(calls):
                self._differently(probe.name)
                return
            forced = calls[done[probe.name]].detach().cpu()  # of a table, numbers of rows
            feed[probe.forced] = (forced.float() if forced.is_floating_point() else forced.long()).numpy()
            done[probe.name] += 1
        for name, evidence in self.evidence.items():
            evidence.calls_differ |= done[name] != len(seen.calls.inputs[name])
        names = sorted({name for probe in self.probes for name in (probe.arrived, probe.codes, probe.output) if name})
        found = dict(zip(names, run(self.forced, feed, self.path, names), strict=True))
        done.clear()
        for probe in self.probes:
            self._compare(probe, seen, done[probe.name], found)
            done[probe.name] += 1

    def _compare(self, probe: Probe, seen: Observation, call: int, found: Mapping[str, NDArray[Any]]) -> None:
        evidence = self.evidence[probe.name]
        if probe.output is not None:
            output = torch.from_numpy(found[probe.output])
            expected = seen.calls.outputs[probe.name][call].cpu().float()
            if output.shape != expected.shape:
                evidence.calls_differ = True
                return
            evidence.add_output(expected, output)
        codes = seen.calls.codes.get(probe.name)
        if codes and probe.arrived is not None and probe.codes is not None:
            same, arrived = (_relative(found[name], probe.zero_point) for name in (probe.codes, probe.arrived))
            evidence.add_codes(codes[call].cpu(), same, arrived)

    def _differently(self, name: str) -> None:
        if name in self.evidence:
            self.evidence[name].calls_differ = True

    def rungs(self, scores: Mapping[str, float]) -> list[Rung]:
        """E1 and E2: a file of float operators is not bit-equal to integer sums.

        Args:
            scores: the task's score of both.
        """
        if self.failure is not None:
            return [Rung("E1 layers", "the file runs on the data", False, {}, self.failure)]
        return [layer_rung(self.evidence), self.distance.rung(scores, flips_in(self.evidence))]


def _relative(codes: NDArray[Any], zero_point: int) -> Tensor:
    """Stored codes counted from the value 0."""
    return torch.from_numpy(codes.astype(np.float32) - zero_point)
