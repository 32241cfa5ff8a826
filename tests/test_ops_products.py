"""Products of bfloat16 matrices in float32, by AVX-512 BF16 and by AMX, and what stands in for them on other CPUs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from miwv_fast import _core, ops
from miwv_fast.ops import launch, products


@pytest.fixture(params=["avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> str:
    """An instruction set with products, selected."""
    name: str = request.param
    if name not in _core.available_isas():
        pytest.skip(f"this CPU has no {name}")
    _core.select_isa(name)
    return name


def filled(*shape: int, value: float = torch.nan) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.bfloat16)


def up(size: int) -> int:
    return -(-size // 32) * 32


def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of any sizes, with NaN wherever nothing should be read or may be overwritten."""
    (count, width), entries = rows.shape, len(weight)
    padded = filled(up(count), up(width) + 7)
    padded[:, : up(width)] = 0
    padded[:count, :width] = rows
    out = torch.full((up(count) + 1, up(entries) + 1), 7.0)
    packed = filled(up(entries) + 1, up(width))
    launch.product(padded[:count], weight, packed, out)
    assert (out[up(count) :] == 7).all() and (out[:, up(entries) :] == 7).all() and packed[up(entries) :].isnan().all()
    return out[:count, :entries].clone()


@pytest.mark.parametrize("count", [1, 31, 33, 70])
@pytest.mark.parametrize("entries", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 577])
def test_float64(isa: str, count: int, entries: int, width: int) -> None:
    """Up to float32 sums, whatever stands beside the weight in memory."""
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(count, width, generator=generator).bfloat16()
    storage = filled(entries, width + 40)
    weight = storage[:, 3 : width + 3]
    weight.copy_(torch.randn(entries, width, generator=generator))
    exact, most = rows.double() @ weight.double().T, rows.double().abs() @ weight.double().abs().T
    assert ((product(rows, weight) - exact).abs() <= 4 * torch.finfo(torch.float32).eps * most).all()


def test_a_row_depends_on_itself_alone(isa: str) -> None:
    """To the bit: on its place, the other rows, NaN and infinity among them, and threads."""
    rows, weight = torch.randn(40, 100).bfloat16(), torch.randn(90, 100).bfloat16()
    whole = product(rows, weight)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(product(rows, weight), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(product(rows[17:18], weight), whole[17:18])
    rows[3, 5], rows[20, 7] = torch.nan, torch.inf
    changed = product(rows, weight)
    assert changed[3].isnan().all() and changed[20].isinf().all()
    kept = [row for row in range(40) if row not in (3, 20)]
    assert torch.equal(changed[kept], whole[kept])


def test_losses_by_every_instruction_set(isa: str) -> None:
    """With several slices of tokens and vocabulary, a weight with a stride of its own, and a bias."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(600, 48, generator=generator).bfloat16()
    weight = torch.randn(5000, 50, generator=generator).bfloat16()[:, 1:49]
    bias = torch.randn(5000, generator=generator).bfloat16()
    targets, offsets = torch.randint(5000, (600,), generator=generator), torch.arange(601)
    losses = []
    for name in ("avx512", isa):
        _core.select_isa(name)
        kind = products.product_of(hidden, products.Head(weight, bias, None, 1.0, 1 << 28), 600)
        assert (type(kind) is products._TiledProduct) == (name == isa)
        losses.append(ops.linear_response_nll(hidden, weight, targets, offsets, bias=bias))
    assert not torch.equal(*losses) and (losses[0] - losses[1]).abs().max() < 1e-5
    # Columns that are adjacent are left to torch.
    columns = ops.linear_response_nll(hidden, weight.T.contiguous().T, targets, offsets, bias=bias)
    assert (columns - losses[0]).abs().max() < 1e-5


def test_tiles_emulated(tmp_path: Path) -> None:
    """The kernel for AMX, whose instructions are functions on arrays there, under both sanitizers."""
    if "avx512" not in _core.available_isas() or not shutil.which("g++"):
        pytest.skip("needs g++ and AVX-512")
    program, source = tmp_path / "tiles", Path(__file__).parent / "emulation" / "tiles.cpp"
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    built = subprocess.run(["g++", *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_without_it_products_are_converted() -> None:
    _core.select_isa("generic")
    assert not launch.has_product()
    head = products.Head(torch.zeros(8, 4, dtype=torch.bfloat16), None, None, 1.0, 1 << 20)
    assert type(products.product_of(head.weight, head, 8)) is products._ConvertedProduct
