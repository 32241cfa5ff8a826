"""The C++ sources under compilers beside the one that builds the package; those that are not installed are skipped."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp"))


@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_compiles_without_a_warning(compiler, tmp_path):
    """Clang knows other intrinsics and built-in functions than GCC, arm64 none of x86's."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    for source in SOURCES:
        subprocess.run([compiler, *flags, "-c", str(source), "-o", str(tmp_path / "out.o")], check=True)
