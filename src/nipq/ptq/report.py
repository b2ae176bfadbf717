"""Report of a post-training quantization: what each stage gained, and what the result costs."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from nipq.budget.bit_table import LimitCost

#: Columns of the printed report.
WIDTH = 80


@dataclass(frozen=True)
class Stage:
    """One step of the quantization, judged on held-out samples.

    Attributes:
        name: such as ``"mixed bits"``.
        distance: of the outputs from the float model's after it, see :func:`nipq.budget.distance.output_distance`.
        agreement: same first choice as the float model's, per cent; None where outputs are no class scores.
        kept: whether the result has it; a stage that does not bring the outputs nearer is undone.
        seconds: that it took.
        note: detail, such as the kind of statistics.
    """

    name: str
    distance: float
    agreement: float | None
    kept: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class QuantizationReport:
    """Report of ``nipq.quantize``: its stages, bits, bytes and limits; prints itself within 80 columns.

    Attributes:
        model: class of the network.
        stages: in their order.
        weight_bits: average over the weights of layers that multiply.
        activation_bits: average over all inputs but the model's own; None if all stay float.
        file_bytes: of the packed file.
        float_bytes: of the float model's parameters and buffers.
        limits: cost under each limit of the budget.
        fit_samples: samples that were measured with.
        held_out_samples: samples that stages were judged by.
        seconds: in all.
    """

    model: str
    stages: tuple[Stage, ...]
    weight_bits: float
    activation_bits: float | None
    file_bytes: int
    float_bytes: int
    limits: tuple[LimitCost, ...]
    fit_samples: int
    held_out_samples: int
    seconds: float

    @property
    def distance(self) -> float:
        """Distance of the result's outputs from the float model's on held-out samples."""
        return self._last.distance

    @property
    def agreement(self) -> float | None:
        """Share of held-out samples with the float model's first choice, per cent; None where there is none."""
        return self._last.agreement

    @property
    def _last(self) -> Stage:
        return [stage for stage in self.stages if stage.kept][-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return asdict(self) | {"distance": self.distance, "agreement": self.agreement}

    def table(self) -> Table:
        """The stages, for a rich console."""
        table = Table(title=f"{self.model}, outputs against the float model's", title_justify="left")
        table.add_column("stage", overflow="fold")
        for heading in ("distance", "agreement", "seconds"):
            table.add_column(heading, justify="right")
        table.add_column("kept", overflow="fold")
        for stage in self.stages:
            table.add_row(
                stage.name,
                f"{stage.distance:.4g}",
                "-" if stage.agreement is None else f"{stage.agreement:.1f} %",
                f"{stage.seconds:.1f}",
                ("yes" if stage.kept else "no") + (f", {stage.note}" if stage.note else ""),
            )
        return table

    def __str__(self) -> str:
        """The table and the costs as plain text."""
        inputs = "float inputs" if self.activation_bits is None else f"{self.activation_bits:.2f} for inputs"
        lines = [
            f"average bits: {self.weight_bits:.2f} for weights, {inputs}",
            f"packed file: {self.file_bytes:,} bytes, 1/{self.float_bytes / self.file_bytes:.1f} of the float model",
            *(
                f"{limit.name}: {limit.rounded:,.6g} of {limit.target:,.6g} {limit.unit} allowed"
                for limit in self.limits
            ),
            f"{self.fit_samples} samples to measure, {self.held_out_samples} held out to judge; {self.seconds:.1f} s",
        ]
        text = io.StringIO()
        console = Console(file=text, width=WIDTH, color_system=None, highlight=False, markup=False)
        console.print(self.table(), *lines, sep="\n")
        return text.getvalue().rstrip()
