"""torch's own transformer encoder: in evaluation it has shortcuts past the forwards of its layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nipq
from nipq.prepare.layer_table import set_bits_, set_phase_


class Masked(nn.Module):
    """A stack of encoders whose padding is masked, which torch would turn into nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=mask)


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[:, 3:] = True
    return {"x": x, "mask": mask} if isinstance(model, Masked) else {"src": x}


@pytest.mark.parametrize("build", [Masked, lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)])
def test_evaluation_runs_the_quantized_layers(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    inputs, fresh = _inputs(model), copy.deepcopy(model)
    nipq.calibrate_(nipq.prepare_(model, inputs), [inputs])
    set_bits_(model, 3)
    set_phase_(model, "round")
    expected = model.train()(**inputs).detach()
    deployed = nipq.convert(model)
    loaded = nipq.load(nipq.save(deployed, tmp_path / "encoder.nipq.safetensors"), fresh)
    kept = ~inputs["mask"] if "mask" in inputs else ...
    with torch.no_grad():  # shortcuts are taken only where no gradient is wanted
        for module in (model.eval(), deployed.eval(), loaded.eval()):
            torch.testing.assert_close(module(**inputs)[kept], expected[kept], rtol=1e-4, atol=1e-5)
