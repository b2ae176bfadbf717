"""Attention of two quantized products: without quantization it is torch's function, with every argument."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from nipq.config import BitRange, Phase
from nipq.errors import OrderError
from nipq.nn.attention import AttentionProducts, Product, install, uninstall
from nipq.nn.layers import LayerQuantization, LayerSpec
from nipq.nn.quantizer import InputQuantizer


def operand(name: str, alpha: float, grid: str = "signed") -> InputQuantizer:
    quantizer = InputQuantizer(name, BitRange(fixed=4))
    quantizer.grid = type(quantizer.grid)(grid)
    quantizer.set_alpha_(torch.tensor([alpha]))
    return quantizer


def product(name: str, alpha: float, other: float, grid: str = "signed") -> Product:
    counts = {"macs": 1, "weight_count": 0, "activation_count": 1, "output_count": 1, "calls": 1}
    spec = LayerSpec(name=name, kind="QueryKey", batchnorm=None, is_input=False, **counts)
    return Product(LayerQuantization(spec, operand(f"{name}.x", alpha, grid), 0, operand(f"{name}.y", other)))


def products(phase: Phase) -> AttentionProducts:
    found = AttentionProducts(product("scores", 2.0, 2.5), product("mix", 1.0, 2.0, "unsigned"), "block.attention")
    for module in found.modules():
        if isinstance(module, InputQuantizer):
            module.phase = phase
    return found.eval()


class Module(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
        return scaled_dot_product_attention(*args, **kwargs)


def tensors(heads: int = 2, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, heads, 5, 8), torch.randn(3, groups, 7, 8), torch.randn(3, groups, 7, 6)


BLOCKED = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
BLOCKED[0, :, 2] = True  # a row that may attend to nothing
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "where": {"attn_mask": ~BLOCKED},
    "minus infinity": {"attn_mask": torch.zeros(3, 1, 5, 7).masked_fill(BLOCKED, -math.inf)},
    "added": {"attn_mask": torch.randn(5, 7)},
    "lowest number": {"attn_mask": torch.zeros(3, 1, 5, 7).masked_fill(BLOCKED, torch.finfo(torch.float32).min)},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_in_phase_float_it_is_torchs_function(arguments: str) -> None:
    module, given = Module(), ARGUMENTS[arguments]
    expected = module(*tensors(), **given)
    install(module, products(Phase.FLOAT))
    assert torch.allclose(module(*tensors(), **given), expected, atol=1e-6)
    uninstall(module)
    assert torch.equal(module(*tensors(), **given), expected)
    assert not list(module.modules())[1:]


def test_grouped_heads_and_arguments_by_name() -> None:
    query, key, value = tensors(4, 2)
    given = {"query": query, "key": key, "value": value, "enable_gqa": True, "is_causal": True}
    expected = scaled_dot_product_attention(**given)
    assert torch.allclose(products(Phase.FLOAT)(**given), expected, atol=1e-6)


@pytest.mark.parametrize("arguments", ["plain", "causal", "where"])
def test_whole_codes_give_what_rounded_values_give(arguments: str) -> None:
    expected = products(Phase.ROUND)(*tensors(), **ARGUMENTS[arguments])
    found = products(Phase.INT)(*tensors(), **ARGUMENTS[arguments])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, scaled_dot_product_attention(*tensors(), **ARGUMENTS[arguments]), atol=1e-2)


def test_sums_that_float32_cannot_hold_run_in_float64() -> None:
    wide = products(Phase.INT)
    for module in wide.modules():
        if isinstance(module, InputQuantizer):
            module.freeze_bits_(16)
    found = wide.mix(torch.rand(1, 2, 4096), torch.rand(1, 4096, 2) + 1)
    assert torch.equal(found, wide.mix(torch.rand(0, 2, 4096), torch.rand(0, 4096, 2)).new_tensor(found.tolist()))
    x, y = torch.ones(1, 1, 4096), torch.full((1, 4096, 1), 1.7)
    quantizers = wide.mix.quantization.input, wide.mix.quantization.computed
    codes = [quantizer.codes(value).double() for quantizer, value in zip(quantizers, (x, y), strict=True)]
    steps = quantizers[0].step() * quantizers[1].step()
    assert torch.equal(wide.mix(x, y), (codes[0] @ codes[1]).float() * steps)


def test_probabilities_are_dropped_after_they_are_quantized() -> None:
    found = products(Phase.ROUND)
    x, y = torch.rand(2, 5, 7), torch.eye(7).expand(2, 7, 7)
    torch.manual_seed(0)
    dropped = found.mix(x, y, 0.5)
    kept = found.mix(x, y)
    assert ((dropped == 0) | torch.isclose(dropped, 2 * kept)).all()
    assert 0.2 < (dropped == 0).float().mean() < 0.8


def test_dropout_on_whole_codes_is_refused() -> None:
    with pytest.raises(OrderError, match=r"mix: expected no dropout where attention is computed in whole codes"):
        products(Phase.INT)(*tensors(), dropout_p=0.1)


def test_gradients_reach_all_four_operands() -> None:
    found = products(Phase.NOISE).train()
    given = [x.requires_grad_() for x in tensors()]
    found(*given).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in given)
    assert len([p for p in found.parameters() if p.grad is not None and p.grad.abs().sum() > 0]) == 4


def test_a_module_that_went_over_to_other_attention_is_refused_by_name() -> None:
    class Either(Module):
        by_hand = False

        def forward(self, *args: Tensor, **kwargs: Any) -> Tensor:
            return args[0] if self.by_hand else super().forward(*args, **kwargs)

    module = Either()
    install(module, products(Phase.ROUND))
    module(*tensors())
    module.by_hand = True
    with pytest.raises(OrderError, match=r"block\.attention: expected attention to call torch's scaled_dot_product"):
        module(*tensors())
