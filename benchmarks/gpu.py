"""Builds, checks and times the CUDA kernels on the GPU of this machine, in one command and without a network.

    python benchmarks/gpu.py --out benchmarks/results

Needs nvcc and, installed, what the build and the tests import (scikit-build-core, pybind11, cmake, ninja, pytest,
hypothesis, pyarrow, jinja2, transformers), and scipy for the whole job. Peers of the rows take part where they are
installed, after all else; the whole job is compared with its peers where MIWV_DATA names the folder with Alpaca's
records. Writes DIR/gpu-<device>-<date>.json, after each case and each part anew, and a log of each check, and prints
short tables last. Where a check fails nothing is timed, unless --keep-going; what is wrong with a case is noted there
and the rest goes on. The exit status is 1 where anything was wrong. --dry-run does everything that needs no GPU: the
list of cases, the file and the tables, without times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from gpu_cases import ROWS, VOCABS, Timer, grid
from gpu_head import head_cases, head_table, measure_head
from gpu_rows import time_peers, time_rows
from gpu_run import ROOT, Run, benchmark, each, step
from gpu_tables import split_table, table

PEERS = ("triton", "liger-kernel", "flash-attn", "trl", "quack-kernels")
TIMED = ("rows", "head", "model", "job", "peers")
SHAPE = ("kernel", "dtype", "vocab", "rows", "density", "view", "hidden_size", "tokens", "slice_tokens", "slice_bytes")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA device: give --dry-run to see the list of cases", file=sys.stderr)
        return 2
    given = re.sub(r" --out[= ]\S+", "", " ".join(["", *(sys.argv[1:] if argv is None else argv)]))
    given = re.sub(r" --oda[= ]\S+", " --oda CHECKOUT", given)
    report = {"command": f"python benchmarks/gpu.py{given}"} | environment(arguments.commit)
    report |= {"checks": {}, "cases": [], "head": [], "model": None, "job": None}
    timed = [name for name in TIMED if name in arguments.parts]
    names = ["gpu", slug(report["device"] or "dry-run"), report["date"], *(timed if timed != list(TIMED) else [])]
    run = Run(arguments, report, arguments.out / f"{'-'.join(names)}.json")
    if arguments.dry_run:
        report["cases"] = list(grid(tuple(arguments.vocabs), tuple(arguments.rows))) if "rows" in timed else []
        report["head"] = list(head_cases()) if "head" in timed else []
    else:
        go(run)
    run.save()
    print(table(report["cases"]), split_table(report["cases"]), head_table(report["head"]), sep="\n\n")
    for name in ("model", "job"):
        print(f"{name}: {json.dumps(report[name])}")
    for name, result in report["checks"].items():
        print(
            f"{name}: {'left out' if result['ok'] is None else 'ok' if result['ok'] else 'FAILED'} {result['summary']}"
        )
    wrong = failures(report)
    print("\n".join([*(f"FAILED {failure}" for failure in wrong), str(run.path)]))
    return 1 if wrong else 0


def go(run: Run) -> None:
    """All parts in turn; where the build fails nothing follows, where a check fails nothing that is timed."""
    for name in (name for name in PARTS if name in run.arguments.parts):
        failed = [check for check, result in run.report["checks"].items() if result["ok"] is False]
        if "build" in failed or (failed and name in TIMED and not run.arguments.keep_going):
            break
        PARTS[name](run)
        run.save()


def failures(report: dict[str, Any]) -> list[str]:
    """What makes the exit status 1. Cases that there was no time or no memory for do not."""
    processes = report["checks"] | {name: report[name] or {} for name in ("model", "job")}
    wrong = [f"{name}: {result['summary']}" for name, result in processes.items() if result.get("ok") is False]
    for case in (*report["cases"], *report["head"]):
        if case.error:
            shape = [f"{name} {value}" for name, value in asdict(case).items() if name in SHAPE]
            wrong.append(f"{', '.join(shape)}: {case.error}")
    return wrong


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="no build, no checks, no times: works without a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some of it (default: all)")
    parser.add_argument("--keep-going", action="store_true", help="time even where a check failed")
    parser.add_argument("--minutes", type=float, default=60, help="be done after this long (default 60)")
    parser.add_argument("--commit", help="what is measured (default: what git says)")
    parser.add_argument("--records", type=int, default=8192, help="of the pass with a 7B shape")
    parser.add_argument("--peer-records", type=int, default=1024, help="of the whole job beside its peers")
    parser.add_argument("--oda", type=Path, help="checkout of OpenDataArena/ODA-DataScorer, a peer of the whole job")
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args(argv)
    if "peers" in arguments.parts and "rows" not in arguments.parts:
        parser.error("--parts peers needs rows, which it stands beside")
    arguments.begin, arguments.out = time.monotonic(), arguments.out.resolve()
    return arguments


def environment(commit: str | None) -> dict[str, Any]:
    commit = commit or output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip() or None
    found = {"date": date.today().isoformat(), "device": None, "driver": None, "versions": versions(), "commit": commit}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["driver"] = output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        ).strip()
        found["device_memory"] = properties.total_memory
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
    return found


def versions() -> dict[str, str | None]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("miwv-fast", *PEERS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    nvcc = output([toolkit("nvcc") or "nvcc", "--version"])
    return found | {"nvcc": (re.findall(r"release ([\d.]+)", nvcc) or [None])[0]}


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def toolkit(name: str) -> str | None:
    """A program of the CUDA toolkit, where CMakeLists.txt looks for nvcc and in that order."""
    named = [f"{os.environ[root]}/bin" for root in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(root)]
    wheels = [str(folder) for place in sys.path for folder in Path(place).glob("nvidia/cu*/bin")]
    folders = [*named, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin", *wheels]
    return shutil.which(name, path=os.pathsep.join(folders))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")


# ---- Checks


def build(run: Run) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "."]
    for option in ("MIWV_CUDA=ON", f"MIWV_CUDA_ARCHS={architecture()}"):
        command += ["-C", f"cmake.define.{option}"]
    # pip's last line is the same whatever went wrong.
    run.report["checks"]["build"] = step(run, "build", command, cause=r"No module named|CMake Error|error:")
    importlib.invalidate_caches()
    run.report["versions"] = versions()


def architecture() -> str:
    """Of this GPU alone, which saves minutes; as in the list of CMakeLists.txt."""
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def test(run: Run) -> None:
    # What a version of torch warns of that nobody has tried is no failure here. All skipped is no pass.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", "tests/cuda"]
    run.report["checks"]["tests"] = step(run, "tests", command, proof=r"\b\d+ passed\b")


def sanitize(run: Run) -> None:
    """compute-sanitizer's memcheck and racecheck of a small run."""
    sanitizer = toolkit("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            run.report["checks"][tool] = {"ok": None, "seconds": 0, "summary": "compute-sanitizer is not installed"}
            continue
        # Driver functions that a library looks for in vain are no errors of ours, nor are torch's own races.
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=miwv"] if tool == "racecheck" else []
        command = [sanitizer, *options, sys.executable, "benchmarks/gpu_sanitize.py"]
        run.report["checks"][tool] = step(run, tool, command, variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        run.save()


# ---- Times


def time_head(run: Run) -> None:
    """The head without logits, in slices of several shapes."""
    device = torch.device("cuda", 0)
    timer = Timer(device, pause=4_000_000)
    cases = run.report["head"] = list(head_cases())
    each(run, cases, lambda case: measure_head(case, timer, device), str)


def time_model(run: Run) -> None:
    """A pass over many records."""
    run.report["model"] = benchmark(run, "model", ["gpu_model.py", "--records", str(run.arguments.records)])


def time_job(run: Run) -> None:
    """The whole job beside plain transformers and, where a checkout is given, OpenDataArena; on MIWV_DATA's records."""
    arguments = run.arguments
    if "MIWV_DATA" not in os.environ:
        run.report["job"] = {"ok": None, "seconds": 0, "summary": "MIWV_DATA names no folder with records"}
        return
    command = ["end_to_end.py", "--device", "cuda", "--shape", "7b", "--records", str(arguments.peer_records)]
    command += ["--ways", "ours", "ours_unshared", "plain"]
    command += ["--oda", str(arguments.oda.resolve())] if arguments.oda else []
    command += ["--commit", run.report["commit"]] if run.report["commit"] else []
    run.report["job"] = benchmark(run, "job", command)


PARTS: dict[str, Callable[[Run], None]] = {
    "build": build,
    "tests": test,
    "sanitizer": sanitize,
    "rows": time_rows,
    "head": time_head,
    "model": time_model,
    "job": time_job,
    "peers": time_peers,  # last: a peer can take the time, or the GPU
}


if __name__ == "__main__":
    sys.exit(main())
