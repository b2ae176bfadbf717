"""Methods against each other at equal budgets: a grid of runs, a table with intervals, pictures."""

from __future__ import annotations

from nipq.compare.cells import Cell, expand
from nipq.compare.grid import Grid, load_grid
from nipq.compare.plots import plot_comparison
from nipq.compare.runner import Outcome, run_cells
from nipq.compare.table import Comparison, compare

__all__ = ["Cell", "Comparison", "Grid", "Outcome", "compare", "expand", "load_grid", "plot_comparison", "run_cells"]
