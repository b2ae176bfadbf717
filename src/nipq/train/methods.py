"""Rival methods by one word: each stands for the fields of a run's config that its authors would choose.

Only what belongs to a method is set here: its estimator, its start, its way to bit-widths, its optimizer for
boundaries. Epochs, learning rate of the weights, teacher, budget and the layers that count are the run's, the same for
all. The equations are in :mod:`nipq.functional.baselines`.
"""

from __future__ import annotations

from typing import Any

#: One optimizer and one learning rate for weights and boundaries.
_ONE_OPTIMIZER = {"quantizer_optimizer": "same", "boundary_lr": None}

_DIFFQ_BITS = {"min": 2, "max": 15, "start": 8}
_DIFFQ: dict[str, Any] = {
    "quantization": {
        "method": "diffq",
        "noise": "gaussian",
        "init": "max",
        "weight_bits": _DIFFQ_BITS,
        "activation_bits": _DIFFQ_BITS,
    },
    "bit_start": "middle",
    "stages": {"finetune": {"phase": "noise"}},
}
_RELEASE_BITS = {"min": 2, "max": 14, "start": 8}

METHODS: dict[str, dict[str, Any]] = {
    # The default: noise proxy with uniform noise, learned bits that start at the budget, size-normalised controller,
    # least-squares start of boundaries.
    "nipq": {},
    # Noise proxy at one bit-width for all: what the proxy does without the search.
    "nipq-fixed": {"allocation": "uniform"},
    # Noise from the tensor's own rounding errors, as in the paper's theory.
    "nipq-empirical": {"quantization": {"noise": "empirical"}},
    # The published code: its start, range, sampler, penalty and single optimizer; no BN re-estimation.
    "nipq-release": {
        "quantization": {
            "noise": "histogram",
            "init": "release",
            "weight_bits": _RELEASE_BITS,
            "activation_bits": _RELEASE_BITS,
        },
        "bit_start": "middle",
        "penalty": "paper",
        "optimizer": {**_ONE_OPTIMIZER, "bits_lr": None},
        "batchnorm_batches": 0,
    },
    # arXiv 1902.08153: the step learned straight through, its gradient scaled; one bit-width for all.
    "lsq": {"quantization": {"method": "lsq", "init": "lsq"}, "allocation": "uniform", "optimizer": _ONE_OPTIMIZER},
    # arXiv 2004.09576: a learned offset for inputs, and a least-squares start.
    "lsq+": {"quantization": {"method": "lsq+", "init": "mse"}, "allocation": "uniform", "optimizer": _ONE_OPTIMIZER},
    # LSQ with bit-widths learned straight through, under the same controller as ours. Not in LSQ's paper.
    "lsq-learned": {"quantization": {"method": "lsq", "init": "mse"}, "bit_start": "middle"},
    # LSQ with bit-widths from Hessian traces and an integer programme (HAWQ-v2, arXiv 1911.03852; v3, 2011.10680).
    "lsq-hawq": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "hawq",
        "optimizer": _ONE_OPTIMIZER,
    },
    # arXiv 2203.11086: LSQ with weights that swing between two levels damped, or frozen.
    "lsq-dampen": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "uniform",
        "optimizer": _ONE_OPTIMIZER,
        "oscillation": {"dampen": 0.005},  # the published 0.1 is per channel and mean over the kernel; this is a sum
    },
    "lsq-freeze": {
        "quantization": {"method": "lsq", "init": "lsq"},
        "allocation": "uniform",
        "optimizer": _ONE_OPTIMIZER,
        "oscillation": {"freeze": 0.01},
    },
    # arXiv 1805.06085: inputs clipped at a learned, decayed boundary; weights by their moments (arXiv 1807.06964).
    "pact": {
        "quantization": {"method": "pact", "init": "mse"},
        "allocation": "uniform",
        "optimizer": {**_ONE_OPTIMIZER, "boundary_decay": 5e-4},
    },
    # arXiv 2104.09987: noise of the whole min-max range, real-valued learned bits, no truncation; never rounds in
    # training. DiffQ quantizes weights only; the first two words treat inputs by the same rule.
    "diffq": _DIFFQ,
    "diffq-uniform": {**_DIFFQ, "quantization": {**_DIFFQ["quantization"], "noise": "uniform"}},
    "diffq-weights": {**_DIFFQ, "quantization": {**_DIFFQ["quantization"], "quantize_inputs": False}},
    # Straight through with the range that calibration found.
    "ste": {"quantization": {"method": "ste", "init": "mse"}, "allocation": "uniform"},
}
