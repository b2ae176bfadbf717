"""Settings and fixtures of all tests, and the two processes that tests of several ranks share."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator

# No test may depend on a display or on how many cores there are; the kernels of one thread add in one order.
os.environ.setdefault("MPLBACKEND", "agg")
# Without a compiler the kernels say so in a warning, which would be an error here; their own tests are then left out.
if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++")):
    os.environ["NIPQ_KERNELS"] = "0"

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.nn import functional

from tests.distributed.ranks import Ranks

torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
settings.register_profile("nipq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nipq")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on several ranks, so that a quick look can leave it out; refuse names that differ by process."""
    for item in items:
        if re.search(r"0x[0-9a-f]{4}", item.nodeid):
            raise pytest.UsageError(
                f"expected a name that is the same in every process, found an address in {item.nodeid}; give ids="
            )
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """``ranks(function, *args)`` calls a function of a test module on two ranks and gives both results."""
    group = Ranks(tmp_path_factory.mktemp("ranks"))
    yield group
    group.close()


class SmallNet(nn.Module):
    """Convolution and batch norm, residual add, SE product, shifted activation, pool and classifier, on 3x8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem_norm(self.stem(x)))
        y = torch.relu(self.depthwise_norm(self.depthwise(x)))
        gate = torch.sigmoid(self.excite(functional.leaky_relu(self.squeeze(y.mean(dim=(2, 3), keepdim=True)))))
        x = x + y * gate
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def small_net() -> Callable[[], nn.Module]:
    """Builds a ``SmallNet`` for evaluation, its batch norms with scales of both signs and statistics of their own."""

    def build() -> nn.Module:
        model = SmallNet()
        with torch.no_grad():
            for norm in (model.stem_norm, model.depthwise_norm):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                norm.weight.normal_()
                norm.bias.normal_()
        return model.eval()

    return build
