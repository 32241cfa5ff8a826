"""A run of gpu.py: its file, what it starts in processes of their own, and its cases, one after the other."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gpu_cases import Case, gpu_is_lost
from gpu_head import HeadCase

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Run:
    """The options, what is known so far, and the file that has it."""

    arguments: argparse.Namespace
    report: dict[str, Any]
    path: Path

    def left(self) -> float:
        """Seconds until --minutes are over."""
        return self.arguments.begin + 60 * self.arguments.minutes - time.monotonic()

    def save(self) -> None:
        """Writes the file at once: whenever this process is stopped, there is a whole one."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.report, indent=1, default=asdict) + "\n")
        part.replace(self.path)


def step(
    run: Run,
    name: str,
    command: list[str],
    *,
    proof: str = "",
    cause: str = "",
    variables: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Runs a command, no longer than there is time, and says how it ended; its log lies beside the file.

    `proof` is what the log of one that did its work says, `cause` what to look for in that of one that failed; without
    it the last line is the summary.
    """
    begin, limit = time.monotonic(), run.left()
    if limit <= 0:
        return {"ok": False, "seconds": 0, "summary": "not begun: out of time"}
    log = run.path.with_name(f"{run.path.stem}-{name}.log")
    with log.open("w") as stream:
        # A session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | (variables or {}),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    ok = status == 0 and any(re.search(proof, line) for line in lines)
    telling = proof if ok else cause
    summary = next((line for line in lines if telling and re.search(telling, line)), lines[-1]).strip("= ")
    if status is None:
        summary = f"stopped after {limit:.0f} s: out of time; its last line: {lines[-1].strip()}"
    result = {"ok": ok, "seconds": round(time.monotonic() - begin, 1), "summary": summary}
    print(f"{name}: {result}", flush=True)
    return result


def benchmark(run: Run, name: str, command: list[str]) -> dict[str, Any]:
    """What another benchmark writes, in a process and with memory of its own; how it ended as well if it fails."""
    out = run.path.with_name(f"{run.path.stem}-{name}.json")
    out.unlink(missing_ok=True)
    with suppress(RuntimeError):  # a kernel that went astray leaves this process without its GPU, but not the next one
        torch.cuda.empty_cache()
    result = step(run, name, [sys.executable, f"benchmarks/{command[0]}", *command[1:], "--output", str(out)])
    written = json.loads(out.read_text()) if out.exists() else {}
    out.unlink(missing_ok=True)
    return written if result["ok"] else result | written


def each(
    run: Run,
    cases: list[Any],
    measure_case: Callable[[Any], None],
    show: Callable[[Case | HeadCase], str],
    left_out: str = "left_out",
    wrong: str = "error",
) -> None:
    """Measures the cases in turn; the file is there after each.

    Why there was nothing to measure is noted in the field `left_out` of a case, what went wrong in the field `wrong`.
    """
    for case in cases:
        if run.left() <= 0:
            setattr(case, left_out, "out of time")
            continue
        if gpu_is_lost():
            setattr(case, left_out, "an earlier case has left the GPU unusable")
            continue
        try:
            torch.cuda.empty_cache()
            measure_case(case)
        except torch.OutOfMemoryError as error:
            setattr(case, left_out, _first_line(error))
        except Exception as error:  # a wrong result, or whatever a driver or a new version of torch comes up with
            setattr(case, wrong, _first_line(error))
        print(show(case), flush=True)
        run.save()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
