"""What all integrations share."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from nipq.errors import MissingDependencyError, OrderError
from nipq.integrations.shared import check_alone, gradient_of, spread_seeds, supported


def test_a_missing_package_and_an_old_one_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        MissingDependencyError, match=r"'accelerate', which is needed for nipq\.integrations\.accelerate"
    ):
        supported("accelerate", least=(1, 1), extra="accelerate")
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(__version__="0.34.2"))
    with pytest.raises(
        MissingDependencyError, match=r'accelerate 1\.1 or newer, found 0\.34\.2\..*"nipq\[accelerate\]"'
    ):
        supported("accelerate", least=(1, 1), extra="accelerate")
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(__version__="1.10.0.dev0"))
    assert supported("accelerate", least=(1, 1), extra="accelerate").__version__ == "1.10.0.dev0"


def test_two_of_a_kind_are_refused() -> None:
    check_alone([1, "a"], int)
    with pytest.raises(OrderError, match=r"trainer: expected one int, found 2\. Remove the others"):
        check_alone([1, 2], int)


def test_seeds_spread_over_ranks_and_rank_zero_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    spread_seeds()
    assert torch.equal(torch.get_rng_state(), state)
    draws = []
    for rank in (1, 2, 1):
        torch.manual_seed(7)
        monkeypatch.setattr("nipq.integrations.shared.rank", lambda rank=rank: rank)
        monkeypatch.setattr("nipq.distributed.collectives.rank", lambda rank=rank: rank)
        spread_seeds()
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_a_gradient_without_a_value() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    term = gradient_of(x**2)
    term.backward()
    assert (term.item(), x.grad) == (0, 6)
