"""What can be said about the Triton kernels on any machine: their numbers, and that they compile for a GPU as meant."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nipq.kernels import triton as triton_device
from nipq.kernels.triton import (
    finish_kernel,
    proxy_backward_kernel,
    proxy_forward_kernel,
    round_backward_kernel,
    round_forward_kernel,
)
from nipq.kernels.triton_tiles import tiling


def before(*version: int) -> bool:
    installed = getattr(triton_device.triton, "__version__", "0.0")
    return tuple(int(part) for part in installed.split(".")[:2]) < version


needs_triton = pytest.mark.skipif(triton_device.triton is None, reason="needs Triton, which is not installed")
compiles = pytest.mark.skipif(triton_device.interpreting(), reason="the interpreter compiles nothing")


def run(*arguments: str, **environment: str) -> None:
    command, known = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.distributed
@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py runs on the GPU")
@pytest.mark.skipif(before(3, 7), reason="the interpreter of this Triton needs an older NumPy")
def test_the_kernels_in_the_interpreter() -> None:
    """A process of its own: Triton decides when it is imported."""
    tests = Path(__file__).with_name("test_triton.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.distributed
def test_without_triton_there_is_no_kernel() -> None:
    run(
        "-c",
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nipq.kernels.triton as proxy, nipq.kernels.triton as rounding\n"
        "x = torch.zeros(3, device='meta')\n"
        "assert not proxy.supported(x, x[:1], 0) and not rounding.supported(x, x[:1], 0)",
    )


def signature_of(kernel, arguments: dict[str, object]) -> tuple[dict[str, str], dict[tuple[int], object]]:
    """Type of every argument, and the value of those that are part of the compiled code."""
    types, values = {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or value == 1:
            types[parameter.name], values[(place,)] = "constexpr", value
        else:
            types[parameter.name] = value if isinstance(value, str) else "fp32" if isinstance(value, float) else "i32"
    return types, values


def compiled(kernel, arguments: dict[str, object], options: dict[str, object]):
    types, values = signature_of(kernel, arguments)
    aligned = [
        place for place, name in enumerate(types) if types[name].startswith("*") or name in ("inner", "channels")
    ]
    attributes = {(place,): [["tt.divisibility", 16]] for place in aligned if (place,) not in values}
    triton = triton_device.triton
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=values, attrs=attributes)
    return triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32), options=options)


SCALARS = {
    "alpha": None, "alpha_raw": "*fp32", "bit_raw": "*fp32", "bits_frozen": None, "bits": None, "key": "*i64",
    "least": 2.0, "most": 14.0, "choices": (2, 3, 4, 6, 8), "stochastic": True, "shift": 0.3, "kind": 2,
}  # fmt: skip
ROUNDING = {"alpha": "*fp32", "alpha_raw": None, "bit_raw": None, "bits": "*fp32", "key": None, "choices": ()}


@needs_triton
@compiles
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (128, 64, 3, 3)])
def test_they_compile_for_a_gpu_as_meant(shape: tuple[int, ...], dtype: str, tmp_path: Path, monkeypatch) -> None:
    """No multiply and add in one, true divisions, nothing flushed to zero, and 16 bytes at a time from memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = tiling(torch.empty(shape, device="meta"), 1 if shape[0] == 8 else 128, 0)
    elements = dict.fromkeys(("x", "y", "grad", "dx"), f"*{dtype}") | {"sums": "*fp32"}
    empirical = {"table": "*fp32", "table_count": "*i64", "cap": 6.0, "capped": True}
    uniform = {"table": None, "table_count": None, "cap": math.inf, "capped": False}
    for kernel, arguments in (
        (proxy_forward_kernel, SCALARS | elements | empirical | tiles.arguments),
        (proxy_backward_kernel, SCALARS | elements | uniform | tiles.arguments),
        (round_forward_kernel, SCALARS | ROUNDING | elements | uniform | tiles.arguments),
        (round_backward_kernel, SCALARS | ROUNDING | elements | uniform | tiles.arguments),
    ):
        code = compiled(kernel, arguments, tiles.options).asm["ptx"]
        assert "fma.rn.f32" not in code
        assert not any(f"{operation}.ftz.f32" in code for operation in ("add", "mul", "div.rn"))
        assert "div.full" not in code
        assert "div.approx" not in code
        assert "ld.global.v4.b32" in code
        assert "st.global.v4.b32" in code


@needs_triton
@compiles
def test_the_last_step_of_backward_compiles_for_a_gpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = {"sums": "*fp32", "d_alpha": "*fp32", "d_bits": "*fp32"}
    for channels in (1, 128):
        tiles = tiling(torch.empty(128, 64, 3, 3, device="meta"), channels, 0)
        for scalars in (SCALARS, SCALARS | ROUNDING):
            given = scalars | arguments | tiles.sum_arguments
            assert "ld.global" in compiled(finish_kernel, given, tiles.options).asm["ptx"]
