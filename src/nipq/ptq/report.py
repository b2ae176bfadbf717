"""Report of a post-training quantization: what each stage gained, and what the result costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType

from nipq.budget.bit_table import LimitCost
from nipq.tables import Column, FittedTable, Prose, plain_text


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

    def table(self) -> FittedTable:
        """The stages, for a rich console of any width."""
        numbers = map(Column, ("distance", "agreement [%]", "time [s]"))
        columns = Column("stage", least=16), *numbers, Column("kept", least=16)
        table = FittedTable(*columns, title=f"{self.model}, outputs against the float model's")
        for stage in self.stages:
            table.add_row(
                stage.name,
                f"{stage.distance:.4g}",
                "-" if stage.agreement is None else f"{stage.agreement:.1f}",
                f"{stage.seconds:.1f}",
                ("yes" if stage.kept else "no") + (f", {stage.note}" if stage.note else ""),
            )
        return table

    def __rich__(self) -> RenderableType:
        """The table and the costs, for a rich console of any width."""
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
        return Group(self.table(), *map(Prose, lines))

    def __str__(self) -> str:
        """The table and the costs as plain text, 80 columns at most."""
        return plain_text(self)
