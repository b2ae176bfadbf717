"""Mixed-precision quantization with the noise proxy (NIPQ): bits, boundaries and weights learned together.

A trailing underscore changes the model in place; a plain verb returns something new.
"""

from __future__ import annotations

from nipq.budget.allocate import allocate_bits_
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize, check_feasible, costs
from nipq.budget.freeze import freeze_bits_
from nipq.budget.hawq import allocate_
from nipq.config import BitRange, Config, Phase, Rule
from nipq.errors import (
    BudgetError,
    ConfigError,
    DistributedError,
    FileFormatError,
    MissingDependencyError,
    NipqError,
    NonFiniteError,
    NotQuantizableError,
    OrderError,
)
from nipq.export.api import export
from nipq.export.convert import convert
from nipq.export.packed_read import load
from nipq.export.packed_write import file_bytes, save
from nipq.prepare.layer_table import set_bits_, set_phase_, temper_
from nipq.prepare.prepare import prepare_, restore_
from nipq.prepare.validate import validate
from nipq.qat.batchnorm import reestimate_bn_
from nipq.qat.calibrate import calibrate_
from nipq.qat.ema import WeightAverage
from nipq.qat.optim import check_optimizer, drop_frozen_, param_groups, without_bits
from nipq.qat.oscillation import Oscillations
from nipq.qat.search import Search
from nipq.qat.session import QATSession
from nipq.report.inspect import inspect
from nipq.report.summary import summary
from nipq.verify.api import verify

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  (in the order of use)
    # Settings
    "BitRange",
    "Config",
    "Phase",
    "Rule",
    # Getting hold of a model
    "inspect",
    "validate",
    "prepare_",
    "calibrate_",
    "restore_",
    "set_bits_",
    "set_phase_",
    "summary",
    # In the training loop
    "param_groups",
    "check_optimizer",
    "drop_frozen_",
    "without_bits",
    "Budget",
    "AverageBits",
    "ModelSize",
    "BitOps",
    "check_feasible",
    "costs",
    "allocate_bits_",
    "Search",
    "QATSession",
    "WeightAverage",
    "temper_",
    "Oscillations",
    "allocate_",
    # Finishing
    "freeze_bits_",
    "reestimate_bn_",
    # Deploying
    "convert",
    "save",
    "load",
    "file_bytes",
    "export",
    "verify",
    # Errors
    "BudgetError",
    "ConfigError",
    "DistributedError",
    "FileFormatError",
    "MissingDependencyError",
    "NipqError",
    "NonFiniteError",
    "NotQuantizableError",
    "OrderError",
    # Which nipq this is
    "__version__",
]
