"""Classifiers of torchvision and timm with random weights, batch norms and bit-widths, all from one seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import nipq
from nipq.errors import require
from nipq.prepare.layer_table import quantizers

#: Arguments that a builder wants besides its name.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "vit_b_16": {"image_size": 96},
}


def built(name: str, size: int) -> nn.Module:
    """A network with the random weights of its own initialisation, in evaluation mode.

    Args:
        name: ``resnet18`` for torchvision, ``timm/lcnet_050`` for timm.
        size: of its images; transformers are built for it.
    """
    if name.startswith("timm/"):
        timm = require("timm", extra="tasks", purpose="the networks of timm")
        kind = name.removeprefix("timm/")
        sized = {"img_size": size} if kind.startswith(("vit_", "deit_", "mixer_")) else {}
        model: nn.Module = timm.create_model(kind, pretrained=False, **sized)
    else:
        models = require("torchvision.models", extra="vision", purpose="the networks of torchvision")
        model = models.get_model(name, weights=None, **ARGUMENTS.get(name, {}))
    return model.eval()


@torch.no_grad()
def shaken_(model: nn.Module, images: Tensor) -> nn.Module:
    """Batch norms as after a training: statistics of data, gains of both signs, shifts.

    Args:
        model: changed in place.
        images: what the statistics are taken from.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        if norm.affine:
            sign = torch.where(torch.rand_like(norm.weight) < 0.1, -1.0, 1.0)
            norm.weight.copy_(sign * torch.empty_like(norm.weight).uniform_(0.5, 1.5))
            norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0
    for norm in norms:
        norm.train()
    model(images)
    return model.eval()


def quantized(
    model: nn.Module, images: Tensor, seed: int, *, bits: int | tuple[int, int] = (2, 8), granularity: str = "tensor"
) -> nn.Module:
    """Prepare a network, calibrate it, and freeze its bits.

    Args:
        model: changed in place.
        images: to calibrate on.
        seed: of the bits.
        bits: one for all layers, or the range from which each quantizer draws its own.
        granularity: of the weights' boundaries.
    """
    config = nipq.Config(weight_bits=(2, 8), activation_bits=(2, 8), granularity=granularity)
    nipq.prepare_(model, images[:1], config)
    nipq.calibrate_(model, [images])
    draw = random.Random(seed)
    for quantizer in quantizers(model):
        if not quantizer.is_frozen:
            quantizer.freeze_bits_(bits if isinstance(bits, int) else draw.randint(*bits))
    return model.eval()


def random_network(
    name: str, size: int, seed: int, *, count: int, bits: int | tuple[int, int] = (2, 8), granularity: str = "tensor"
) -> tuple[nn.Module, Tensor]:
    """A prepared network with frozen bits, and the images that it was calibrated on.

    Args:
        name: as for :func:`built`.
        size: of its images, pixels.
        seed: of weights, images and bits.
        count: of images.
        bits: as for :func:`quantized`.
        granularity: as for :func:`quantized`.
    """
    torch.manual_seed(seed)
    model = built(name, size)
    images = torch.randn(count, 3, size, size)
    return quantized(shaken_(model, images), images, seed, bits=bits, granularity=granularity), images
