"""The CUDA kernels without a GPU: their sources run on fibres against float64, and the compiler's resource report."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests" / "emulation"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GROUPS = (
    "values",
    "same_bits",
    "special_values",
    "strides",
    "responses",
    "bad_indices",
    "split",
    "transforms",
    "partials",
)


def _nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        filter(None, (shutil.which(f"{home}/bin/nvcc") for home in homes if home)), None
    )


def _cuda_headers() -> Path | None:
    """A folder with cuda_bf16.h: of a toolkit, or of the wheels that torch for CUDA brings."""
    toolkits = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    toolkits += [Path("/usr/local/cuda/include"), *sorted(Path("/usr/local").glob("cuda-*/include"))]
    if nvcc := _nvcc():
        toolkits.append(Path(nvcc).resolve().parents[1] / "include")
    folders = {*site.getsitepackages(), *sys.path}
    wheels = [found for folder in sorted(folders) for found in Path(folder).glob("nvidia/*/include")]
    # The wheels of CUDA 13 have not all of them.
    needed = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime_api.h", "vector_types.h", "crt/host_defines.h")
    return next((f for f in (*toolkits, *wheels) if all((f / header).is_file() for header in needed)), None)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler, headers = shutil.which("g++"), _cuda_headers()
    if compiler is None:
        pytest.skip("needs g++")
    if headers is None:
        pytest.skip("needs cuda_bf16.h and cuda_fp16.h, from a CUDA toolkit or its wheels")
    program = tmp_path_factory.mktemp("emulation") / "rows"
    flags = ["-std=c++17", "-O1", "-fsanitize=undefined", "-fno-sanitize-recover=undefined", "-ffp-contract=off"]
    flags += ["-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-DMIWV_EMULATION"]
    command = [compiler, *flags, f"-I{EMULATION}", "-isystem", str(headers), str(EMULATION / "rows.cpp")]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


# 2.4e-7 is what PTX allows ex2.approx to be off by, here always to the same side.
@pytest.mark.parametrize(
    "arguments",
    [
        *((group,) for group in GROUPS),
        *((g, e) for g in ("values", "responses", "partials") for e in ("2.4e-7", "-2.4e-7")),
    ],
    ids=" ".join,
)
def test_emulated_kernels(emulated: Path, arguments: tuple[str, ...]) -> None:
    run = subprocess.run([str(emulated), *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


@pytest.mark.parametrize("architecture", ["80", "90a"])
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_registers_suffice(source: Path, architecture: str, tmp_path: Path) -> None:
    """No spill and no local memory: a streaming kernel that touches its stack runs at a fraction of its speed."""
    nvcc = _nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-cubin", "-Xptxas", "-v", str(source)]
    command += [
        "-gencode",
        f"arch=compute_{architecture},code=sm_{architecture}",
        "-o",
        str(tmp_path / "kernels.cubin"),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    report = built.stdout + built.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert frames and len(frames) == report.count("Compiling entry function"), report
    assert set(frames) == {("0", "0", "0")}, report
