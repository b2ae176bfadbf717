"""Tables fit the console: columns go or continue below, borders and numbers stay whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nipq.tables import Column, FittedTable, plain_text


def lines(table: FittedTable, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return text.getvalue().splitlines()


@pytest.fixture
def table() -> FittedTable:
    table = FittedTable(
        Column("layer", least=20), Column("bits"), Column("alpha", rank=2), Column("weights", rank=1), title="Layers"
    )
    table.add_row("layer1.0.downsample.0.conv", "4", "0.123", "11,678,912")
    table.add_row("[head]", "8", "1.5", "512")
    return table


def test_all_is_shown_where_there_is_room(table: FittedTable) -> None:
    text = "\n".join(lines(table, 100))
    assert all(part in text for part in ("layer1.0.downsample.0.conv", "0.123", "11,678,912", "[head]", "Layers"))
    assert "Not shown" not in text


def test_columns_go_by_rank_and_are_named(table: FittedTable) -> None:
    for width, gone in ((48, ["alpha"]), (40, ["alpha", "weights"])):
        found = lines(table, width)
        heading = next(line for line in found if "bits" in line)
        assert [name for name in ("alpha", "weights") if name not in heading] == gone
        assert f"Not shown at this width: {', '.join(gone)}; to_dict() and --json have everything." in " ".join(
            " ".join(found).split()
        )


@pytest.mark.parametrize("width", range(30, 100, 7))
def test_borders_are_whole_at_every_width(table: FittedTable, width: int) -> None:
    drawn = [line for line in lines(table, width) if line[:1] in tuple("┏┡│└┃")]
    assert {len(line) for line in drawn} == {len(drawn[0])}
    assert all(line[-1] in "┓┩│┘┃" for line in drawn)
    assert max(map(len, drawn)) <= width


def test_columns_without_a_rank_continue_below() -> None:
    table = FittedTable(Column("bits", least=7), *(Column(f"budget {i}") for i in range(9)))
    table.add_row("all 8", *(f"{10**i:,}" for i in range(9)))
    text = plain_text(table)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"{10**i:,} " in text for i in range(9))
    assert text.count("all 8") > 1
