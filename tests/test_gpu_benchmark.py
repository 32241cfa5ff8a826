"""benchmarks/gpu.py as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(GPU), *arguments], capture_output=True, text=True, timeout=300)


def test_dry_run(tmp_path: Path) -> None:
    done = _run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-*.json")
    report = json.loads(path.read_text())
    assert str(path) in done.stdout and "| kernel | V | rows |" in done.stdout
    assert {"command", "date", "device", "driver", "versions", "checks", "cases"} <= set(report)
    assert len(report["head"]) == 42 and report["model"] is None
    keys = {"kernel", "dtype", "vocab", "rows", "density", "view", "seconds", "bytes", "fraction_of_copy"}
    shapes = set()
    for case in report["cases"]:
        assert keys | {"fraction_of_read", "peers"} <= set(case)
        assert case["kernel"] in ("row", "split", "difference") and case["seconds"] is None and case["peers"] == {}
        shapes.add((case["vocab"], case["rows"], case["density"], case["view"]))
    assert len(shapes) == 5 * 5 * 3 * 2
    assert {case["bytes"] for case in report["cases"] if case["vocab"] == 50257 and case["rows"] == 1} == {2 * 50257}


def test_the_end_to_end_pass_on_a_cpu(tmp_path: Path) -> None:
    """A model of no size over the lengths of 300 records: the plan, the batches and the figures are the real ones."""
    command = [sys.executable, str(GPU.with_name("gpu_model.py")), "--device", "cpu", "--shape", "tiny"]
    command += ["--records", "300", "--output", str(tmp_path / "model.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "model.json").read_text())
    assert 0.6 < result["forwarded_tokens"] / result["two_plain_passes_tokens"] < 0.75
    assert 0 < result["fraction_of_matrix_product"] < 1 and result["padding_share"] < 0.1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _run("--out", str(tmp_path))
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
