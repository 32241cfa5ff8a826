r"""Which instruction set runs, on this CPU and on others.

Run as a program, this file needs neither torch nor pytest: it loads the extension alone and compares every instruction
set that the CPU offers with float64. So an emulator can stand in for CPUs that aren't at hand:

    apt-get install qemu-user-static
    core=$(python -c 'import miwv_fast._core as c; print(c.__file__)')
    python=$(python -c 'import sys; print(sys.executable)')
    for cpu in Nehalem Haswell max; do qemu-x86_64-static -cpu $cpu $python tests/test_ops_dispatch.py $core; done

which ends with `generic` alone for Nehalem, and with `generic avx2` for Haswell and max (qemu has no AVX-512). For
arm64, with an arm64 Python and its headers unpacked into $ROOT (`apt-get download python3.11:arm64`, `dpkg-deb -x`, and
so on for what it needs), and g++-aarch64-linux-gnu:

    aarch64-linux-gnu-g++ -std=c++17 -O3 -fPIC -shared -pthread -ffp-contract=fast -DMIWV_VERSION='""' -o _core.so \
        -I$ROOT/usr/include -I$ROOT/usr/include/python3.11 $(python -m pybind11 --includes) csrc/bindings.cpp \
        csrc/cpu/*.cpp
    qemu-aarch64-static -L $ROOT $ROOT/usr/bin/python3.11 tests/test_ops_dispatch.py _core.so

With _core.so beside the package's Python files, and torch, transformers and pytest for arm64 on PYTHONPATH (`pip
install --platform manylinux_2_28_aarch64 --only-binary=:all: --no-deps --target`), `-m pytest tests/test_ops_rows.py`
and the like run there, too, but for tests that start a process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from array import array
from math import exp, fsum, inf, isnan, log, nan, sin
from pathlib import Path
from typing import Any


def check(core: Any) -> None:
    """Every available instruction set against float64, for rows of several sizes and special values."""
    for vocab in (1, 5, 64, 100, 1029, 5003):
        row = array("f", (7 * sin(v * v) for v in range(vocab)))
        rows = [row, array("f", row), array("f", row), array("f", row)]
        rows[1][vocab - 1] = 60
        rows[2][vocab // 2] = nan
        rows[3][0] = -inf
        logits = array("f", [value for row in rows for value in row])
        targets, out = array("q", [0, vocab - 1, 0, 0]), array("f", [0] * 4)
        packed = (logits.buffer_info()[0], 0, 4, vocab, vocab, 4, 0)
        top = max(row)
        plain = row[0] - top - log(fsum(exp(value - top) for value in row))
        for isa in core.available_isas():
            core.select_isa(isa)
            core.cpu_token_logprobs(packed, 0, targets.buffer_info()[0], 4, out.buffer_info()[0], 2)
            masked = isnan(out[3]) if vocab == 1 else out[3] == -inf
            assert abs(out[0] - plain) < 1e-5 and -1e-5 < out[1] <= 0 and isnan(out[2]) and masked, (isa, vocab, out)


def load(path: str) -> Any:
    """The extension by itself: neither the package nor torch is imported."""
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec and spec.loader
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def run(isa: str) -> subprocess.CompletedProcess[str]:
    """A process that loads the extension where MIWV_ISA is set, and prints what it runs."""
    from miwv_fast import _core

    code = "import sys; from test_ops_dispatch import load; print(load(sys.argv[1]).isa())"
    return subprocess.run(
        [sys.executable, "-c", code, _core.__file__],
        cwd=Path(__file__).parent,
        env={**os.environ, "MIWV_ISA": isa},
        capture_output=True,
        text=True,
    )


def test_every_instruction_set_of_this_cpu() -> None:
    from miwv_fast import _core

    check(_core)


def test_the_best_is_chosen_and_another_can_be_forced() -> None:
    from miwv_fast import _core

    assert run("").stdout.split() == _core.available_isas()[-1:]
    assert run("generic").stdout.split() == ["generic"]


def test_an_unknown_instruction_set_fails_at_import() -> None:
    done = run("avx1024")
    assert done.returncode != 0
    assert "MIWV_ISA: instruction set 'avx1024' is not among those of this CPU and build: generic" in done.stderr


if __name__ == "__main__":
    extension = load(sys.argv[1])
    check(extension)
    print("ok:", *extension.available_isas())
