"""Mixed-precision quantization of PyTorch models: quantization-aware training (QAT) and post-training quantization.

NIPQ (noise-injected pseudo-quantization) learns the bit-width and the clipping range of every weight and activation
tensor together with the weights, under a budget of average bits, bytes or bit-operations.

A trailing underscore changes the model in place; a plain verb returns something new. Public names are imported when
they are first used, so that ``import nipq`` and the command line start without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nipq.budget.allocate import allocate_bits_
    from nipq.budget.budget import AverageBits, BitOps, ModelSize, costs
    from nipq.budget.freeze import freeze_bits_
    from nipq.config import Config, Rule
    from nipq.errors import NipqError
    from nipq.export.api import export
    from nipq.export.packed_read import load
    from nipq.export.packed_write import save
    from nipq.prepare.convert import convert
    from nipq.prepare.prepare import prepare_, restore_
    from nipq.prepare.validate import validate
    from nipq.ptq.quantize import QuantizedModel, quantize
    from nipq.qat.batchnorm import reestimate_bn_
    from nipq.qat.calibrate import calibrate_
    from nipq.qat.optim import param_groups
    from nipq.qat.session import QATSession
    from nipq.report.inspect import inspect
    from nipq.report.summary import summary
    from nipq.verify.api import verify

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  (in the order of use)
    # Settings and budgets
    "Config",
    "Rule",
    "AverageBits",
    "BitOps",
    "ModelSize",
    # Preparing a model
    "inspect",
    "validate",
    "prepare_",
    "restore_",
    "calibrate_",
    "allocate_bits_",
    # Post-training quantization
    "quantize",
    "QuantizedModel",
    # Training
    "param_groups",
    "QATSession",
    "freeze_bits_",
    "reestimate_bn_",
    # Deploying
    "convert",
    "save",
    "load",
    "export",
    "verify",
    "summary",
    "costs",
    "NipqError",
    "__version__",
]

#: Public names by the module that defines them; a test holds this, ``__all__`` and the imports above to each other.
_PUBLIC = {
    "nipq.budget.allocate": ("allocate_bits_",),
    "nipq.budget.budget": ("AverageBits", "BitOps", "ModelSize", "costs"),
    "nipq.budget.freeze": ("freeze_bits_",),
    "nipq.config": ("Config", "Rule"),
    "nipq.errors": ("NipqError",),
    "nipq.export.api": ("export",),
    "nipq.prepare.convert": ("convert",),
    "nipq.export.packed_read": ("load",),
    "nipq.export.packed_write": ("save",),
    "nipq.prepare.prepare": ("prepare_", "restore_"),
    "nipq.prepare.validate": ("validate",),
    "nipq.ptq.quantize": ("QuantizedModel", "quantize"),
    "nipq.qat.batchnorm": ("reestimate_bn_",),
    "nipq.qat.calibrate": ("calibrate_",),
    "nipq.qat.optim": ("param_groups",),
    "nipq.qat.session": ("QATSession",),
    "nipq.report.inspect": ("inspect",),
    "nipq.report.summary": ("summary",),
    "nipq.verify.api": ("verify",),
}

_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


class _Package(ModuleType):
    """Module type of the package: the functions ``export`` and ``verify`` win over the packages that define them."""

    def __setattr__(self, name: str, value: object) -> None:
        """Set an attribute, unless the import system binds a subpackage to the name of a public function."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Import a public name, or a subpackage such as ``nipq.errors``, when it is first used (PEP 562)."""
    if name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
        globals()[name] = found
        return found
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
