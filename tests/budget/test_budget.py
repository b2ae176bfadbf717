"""Limits count what they say, in exact numbers, and impossible ones are refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from nipq.budget.bit_table import BitTable, Limit, feasible_range
from nipq.budget.budget import AverageBits, BitOps, Budget, ModelSize, check_feasible, costs
from nipq.config import Config, Rule
from nipq.errors import BudgetError, ConfigError
from nipq.export.packed_write import save
from nipq.functional.cost import cost
from nipq.prepare.convert import convert
from nipq.prepare.layer_table import layer_table, set_bits_
from nipq.prepare.prepare import prepare_
from nipq.qat.calibrate import calibrate_

IMAGE = torch.zeros(1, 3, 6, 6)


def net(config: Config | None = None) -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 10)]
    return prepare_(nn.Sequential(*layers), IMAGE, config or Config())


# Weights: 108, 180, 200. Inputs: 108 (the image), 64, 20. MACs: 108*16, 180*4, 200.
def test_average_bits_weigh_by_elements_and_leave_the_image_out() -> None:
    model = net()
    set_bits_(model, {"0": 2, "2": {"weights": 3, "activations": 4}, "5": {"weights": 8, "activations": 6}})
    weights, activations = costs(model, AverageBits(weights=8, activations=8))
    assert weights.rounded == weights.soft == pytest.approx((2 * 108 + 3 * 180 + 8 * 200) / 488)
    assert activations.rounded == pytest.approx((4 * 64 + 6 * 20) / 84)


def test_bit_operations_multiply_both_bit_widths_of_a_layer() -> None:
    model = net()
    set_bits_(model, {"0": 2, "2": {"weights": 3, "activations": 4}, "5": {"weights": 8, "activations": 6}})
    (found,) = costs(model, BitOps(10**9))
    assert found.rounded == 1728 * 2 * 8 + 720 * 3 * 4 + 200 * 8 * 6


def test_float_inputs_count_8_bits_if_they_are_the_models_own_else_32() -> None:
    model = net(Config(input_bits=None, rules=(Rule("2", quantize_input=False),)))
    set_bits_(model, {"*": {"weights": 4}, "5": {"weights": 4, "activations": 4}})
    (found,) = costs(model, BitOps(10**9))
    assert found.rounded == 1728 * 4 * 8 + 720 * 4 * 32 + 200 * 4 * 4


def test_the_model_size_is_the_size_on_disk(tmp_path) -> None:
    for bits in (2, 5):
        model = net()
        calibrate_(model, [torch.randn(2, 3, 6, 6)])
        set_bits_(model, bits)
        (found,) = costs(model, ModelSize("1 MB"))
        save(convert(model.eval()), tmp_path / f"{bits}.safetensors")
        assert found.rounded == (tmp_path / f"{bits}.safetensors").stat().st_size


def test_every_bit_parameter_has_a_price_in_bit_operations() -> None:
    model = net()
    table = BitTable(layer_table(model))
    (limit,) = BitOps("1 M").limits(model)
    cost(limit.form, *table.split(table.bits())).backward()
    assert all(q.bit_raw.grad.item() > 0 for q in table.quantizers if not q.is_frozen)


def test_a_shared_weight_is_counted_once_in_size_and_twice_in_operations() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    prepare_(model, torch.zeros(1, 4))
    average, operations = (AverageBits(weights=4) & BitOps("1 M")).limits(model)
    assert average.denominator == 16
    assert operations.exact_cost([3], [8, 5]) == 16 * 3 * 8 + 16 * 3 * 5


def test_exact_costs_agree_with_the_form_and_limits_are_read_as_written() -> None:
    model = net()
    for limit in (AverageBits(4.1, 3.3) & BitOps("1 M") & ModelSize("9 kB")).limits(model):
        wb, ab = [3, 7, 5], [8, 2, 6]
        exact = limit.exact_cost(wb, ab)
        assert float(exact) == pytest.approx(float(cost(limit.form, torch.tensor(wb), torch.tensor(ab))), rel=1e-15)
    limit = _with_target(AverageBits(weights=4.1).limits(model)[0], 4.1)
    assert limit.allows(limit.exact_cost([4, 4, 4], [8, 8, 8]))
    from_floats = 488 * 4.1  # 2000.8 as written
    assert limit.denominator == 488
    assert limit.exact_cost([4, 4, 4], [2, 2, 2]) * 488 == 1952 < from_floats


def _with_target(limit: Limit, target: float) -> Limit:
    return Limit(limit.name, limit.unit, target, limit.mode, limit.form, limit.denominator, limit.accounting)


@pytest.mark.parametrize(
    ("value", "bytes_"),
    [
        ("1.2 MB", 1_200_000),
        ("1.2MiB", 1_258_291),
        ("900 kB", 900_000),
        (4096, 4096),
        ("1e6", 1_000_000),
        ("0.3 KB", 300),
        ("2 GiB", 2**31),
        ("7 bytes", 7),
    ],
)
def test_sizes_are_read_exactly(value: int | str, bytes_: int) -> None:
    assert ModelSize(value).bytes == bytes_


def test_operations_are_read_exactly() -> None:
    assert BitOps("5.3 G").count == 5_300_000_000 == BitOps(5.3e9).count == BitOps("5.3 GBOPs").count


UNITS = ["30 mB", "30 Mb", "1 mib", "1 gb"]  # milli, and bits


@pytest.mark.parametrize("value", ["", "big", "1.2.3 MB", "-3 MB", 0, "0.1", float("nan"), float("inf"), *UNITS])
def test_what_is_no_size_is_refused(value: float | str) -> None:
    with pytest.raises(ConfigError, match="ModelSize: expected a number above 0"):
        ModelSize(value)


def test_other_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected weights, activations or both, found neither"):
        AverageBits()
    with pytest.raises(ConfigError, match=r"AverageBits\(activations=\): expected bits above 0, found -1"):
        AverageBits(4, -1)
    with pytest.raises(ConfigError, match="BitOps: expected mode 'bound' or 'target', found 'below'"):
        BitOps("5 G", mode="below")  # type: ignore[arg-type]


def test_budgets_join_flatly_and_refuse_the_same_limit_twice() -> None:
    joined: Budget = AverageBits(weights=4) & (ModelSize("9 kB") & BitOps("1 M"))
    assert [limit.name for limit in joined.limits(net())] == ["average weight bits", "model size", "bit-operations"]
    assert joined.to_dict()["parts"][1] == {"kind": "ModelSize", "size": "9 kB", "mode": "bound"}
    with pytest.raises(ConfigError, match="expected one limit on average weight bits, found two"):
        (AverageBits(weights=4) & AverageBits(weights=5)).limits(net())


def test_no_quantized_input_has_no_average() -> None:
    with pytest.raises(BudgetError, match="none but the model's own is quantized"):
        AverageBits(activations=4).limits(net(Config(quantize_inputs=False)))


def test_the_feasible_range_honours_fixed_bits_and_is_logged(caplog) -> None:
    model = net(Config(weight_bits=(2, 6), rules=(Rule("5", weight_bits=8),)))
    with caplog.at_level(logging.INFO, logger="nipq"):
        (found,) = check_feasible(model, AverageBits(weights=5))
    assert (found.low, found.high) == (
        pytest.approx((2 * 288 + 8 * 200) / 488),
        pytest.approx((6 * 288 + 8 * 200) / 488),
    )
    assert "average weight bits <= 5 bit, possible 4.45902 to 6.81967 bit" in caplog.text
    assert found == feasible_range(AverageBits(weights=5).limits(model)[0], layer_table(model))


def test_a_budget_out_of_reach_names_its_range() -> None:
    with pytest.raises(BudgetError, match=r"average weight bits within 2 to 8 bit.*found 1.5. Raise it"):
        check_feasible(net(), AverageBits(weights=1.5))
    with pytest.raises(BudgetError, match=r"bit-operations within 31,328 to .* BOP"):
        check_feasible(net(), AverageBits(weights=4) & BitOps(30_000))
    with pytest.raises(BudgetError, match=r"within 2 to 8 bit.*found 9. Lower it"):
        check_feasible(net(), AverageBits(weights=9, mode="target"))
    check_feasible(net(), AverageBits(weights=9))  # as a bound it holds anyway
    check_feasible(net(), AverageBits(weights=2, activations=2, mode="target"))  # the very end of the range
