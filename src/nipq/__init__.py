"""Mixed-precision quantization with the noise proxy (NIPQ): bits, boundaries and weights learned together.

A trailing underscore changes the model in place; a plain verb returns something new.
"""

from __future__ import annotations

from nipq.allocation import allocate_
from nipq.averaging import WeightAverage
from nipq.batchnorm import reestimate_bn_
from nipq.bit_start import start_bits_
from nipq.budget import AverageBits, BitOps, Budget, ModelSize, check_feasible, costs
from nipq.calibrate import calibrate_
from nipq.config import BitRange, Config, Rule
from nipq.control import set_bits_, set_phase_, temper_
from nipq.course import Course
from nipq.deploy.convert import convert
from nipq.deploy.file import file_bytes, save
from nipq.deploy.load import load
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
from nipq.inspection import inspect
from nipq.optim import check_optimizer, drop_frozen_, param_groups, without_bits
from nipq.oscillation import Oscillations
from nipq.phases import Phase
from nipq.prepare import prepare_, restore_
from nipq.search import Search
from nipq.snap import freeze_bits_
from nipq.summary import summary
from nipq.validate import validate
from nipq.verify.ladder import verify

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
    "start_bits_",
    "Search",
    "Course",
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
