"""From a float model to the deployed one: layers of every form, batch norms with other readers, names like ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.config import Config
from nipq.prepare.layer_table import set_phase_
from tests.prepare.test_probe import KEPT, LINEAR
from tests.prepare.test_probe import Net as Own
from tests.prepare.test_probe import X as IMAGES
from tests.prepare.test_trace import NORMS, OTHERS, READERS, WRITERS, Watched

BITS = Config(weight_bits=4, activation_bits=4)


def first(output: object) -> Tensor:
    found = getattr(output, "z", output)
    assert isinstance(found, Tensor)
    return found


@torch.no_grad()
def deployed_equals_trained(model: nn.Module, x: Tensor) -> nn.Module:
    """Prepare, calibrate, freeze and convert; the deployed model, which is the trained one in either phase."""
    nipq.prepare_(model, x, BITS)
    nipq.calibrate_(model, [x])
    nipq.freeze_bits_(model)
    model.eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        norm.running_mean.normal_(generator=torch.Generator().manual_seed(1))
        norm.bias.fill_(0.3)
    deployed = nipq.convert(model)
    found = first(deployed(x))
    set_phase_(model, "round")
    trained = first(model(x))
    assert (trained - found).abs().max() <= 1e-6 * trained.abs().max()
    set_phase_(model, "int")
    assert torch.equal(first(model(x)), found)
    return deployed


@pytest.mark.parametrize("case", [case for case in (*KEPT, *LINEAR) if case != "channels on another axis"])
def test_a_layer_with_a_forward_of_its_own_is_deployed_as_it_was_trained(case: str) -> None:
    deployed_equals_trained(Own(copy.deepcopy((KEPT | LINEAR)[case])), IMAGES)


@pytest.mark.parametrize(
    "how", [how for how in ("nothing", *WRITERS, *READERS, *NORMS, *OTHERS) if how != "trains itself"]
)
def test_what_a_convolution_made_is_deployed_for_all_its_readers(how: str) -> None:
    deployed_equals_trained(Watched(how), torch.randn(2, 4, 3, 3))


def test_what_an_attribute_keeps_of_training_is_copied_without_its_graph() -> None:
    model = Watched("attribute")
    model(torch.randn(2, 4, 3, 3))
    assert model.last.grad_fn is not None
    deployed = deployed_equals_trained(model, torch.randn(2, 4, 3, 3))
    assert deployed.last.grad_fn is None


NAMES = ["scale", "offset", "step", "input_step", "layer", "kind", "weight_codes", "weight_bits", "folded_into", "spec"]


class Named(nn.Linear):
    """A layer that computes with an attribute of any name."""

    def __init__(self, name: str, value: Tensor | float) -> None:
        super().__init__(4, 4)
        self.used = name
        if isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * getattr(self, self.used)


@pytest.mark.parametrize("buffer", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_layers_may_have_attributes_with_names_of_ours(name: str, buffer: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), Named(name, torch.tensor(1.5) if buffer else 1.5), nn.Linear(4, 2))

    x = torch.randn(8, 4)
    deployed = deployed_equals_trained(build(), x)
    nipq.save(deployed, tmp_path / "model.nipq.safetensors")
    assert torch.equal(nipq.load(tmp_path / "model.nipq.safetensors", build())(x), deployed(x))
