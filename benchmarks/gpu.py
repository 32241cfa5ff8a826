"""Builds, checks and times the CUDA kernels on the GPU of this machine, in one command and without a network.

    python benchmarks/gpu.py --out benchmarks/results

Needs nvcc and, installed, what the build and the tests import (scikit-build-core, pybind11, cmake, ninja, pytest,
hypothesis, pyarrow, jinja2, transformers), and scipy for the whole job. Peers take part where they are installed; the
whole job is compared with its peers where MIWV_DATA names the folder with Alpaca's records. Writes
DIR/gpu-<device>-<date>.json and the logs of the checks, and prints a short table last. Where a check fails nothing is
timed, unless --keep-going, and the exit status is 1. --dry-run does everything that needs no GPU: the list of cases,
the file and the table, without times.
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
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from gpu_cases import DTYPES, ROWS, VOCABS, Case, Timer, grid, measure, problem_of
from gpu_head import head_cases, head_table, measure_head

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("triton", "liger-kernel", "flash-attn", "trl", "quack-kernels")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.dry_run and not torch.cuda.is_available():
        print("no CUDA device: give --dry-run to see the list of cases", file=sys.stderr)
        return 2
    report: dict[str, object] = {"command": "python " + " ".join(["benchmarks/gpu.py", *(argv or sys.argv[1:])])}
    report |= environment() | {"checks": {}, "cases": [], "head": [], "model": None, "end_to_end": None}
    path = arguments.out / f"gpu-{slug(str(report['device'] or 'dry-run'))}-{report['date']}.json"
    passed = True
    if not arguments.dry_run:
        report["checks"] = check(arguments)
        passed = all(result["ok"] for result in report["checks"].values() if result["ok"] is not None)
    cases = list(grid(tuple(arguments.vocabs), tuple(arguments.rows)))
    if arguments.dry_run:
        report["cases"] = [case.as_json() for case in cases]
        report["head"] = list(head_cases())
    elif passed or arguments.keep_going:
        report["head"] = run_head(arguments, report, path)
        report["model"] = run_model(arguments)
        report["end_to_end"] = run_end_to_end(arguments)
        report["cases"], report["cases_left_out"] = run(cases, arguments, report, path)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["cases"]))
    print(head_table(report["head"]))
    for name in ("model", "end_to_end"):
        print(f"{name}: {json.dumps(report[name])}")
    for name, result in report["checks"].items():
        print(
            f"{name}: {'ok' if result['ok'] else 'left out' if result['ok'] is None else 'FAILED'} {result['summary']}"
        )
    print(path)
    return 0 if passed else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="no build, no checks, no times: works without a GPU")
    parser.add_argument("--skip-build", action="store_true", help="time what is installed")
    parser.add_argument("--skip-checks", action="store_true", help="neither tests nor compute-sanitizer")
    parser.add_argument("--keep-going", action="store_true", help="time even where a check failed")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--minutes", type=float, default=60, help="begin no case after this long (default 60)")
    parser.add_argument("--records", type=int, default=8192, help="of the end-to-end pass with a 7B shape (0: none)")
    parser.add_argument("--peer-records", type=int, default=256, help="of the whole job beside its peers (0: none)")
    parser.add_argument("--oda", type=Path, help="checkout of OpenDataArena/ODA-DataScorer, a peer of the whole job")
    parser.add_argument("--vocabs", type=int, nargs="+", default=VOCABS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    arguments = parser.parse_args(argv)
    arguments.begin, arguments.out = time.monotonic(), arguments.out.resolve()
    return arguments


def environment() -> dict[str, object]:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("miwv-fast", *PEERS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["nvcc"] = (re.findall(r"release ([\d.]+)", output(["nvcc", "--version"])) or [None])[0]
    commit = output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip() or None
    found = {"date": date.today().isoformat(), "device": None, "driver": None, "versions": versions, "commit": commit}
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


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")


# ---- Checks


def check(arguments: argparse.Namespace) -> dict[str, dict[str, object]]:
    """The build, tests/cuda, and compute-sanitizer's memcheck and racecheck of a small run."""
    python, out = sys.executable, arguments.out
    checks = {}
    if not arguments.skip_build:
        build = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "."]
        options = ("MIWV_CUDA=ON", f"MIWV_CUDA_ARCHS={architecture()}")
        build += [word for option in options for word in ("-C", f"cmake.define.{option}")]
        checks["build"] = step("build", build, out)
        if not checks["build"]["ok"]:
            return checks
    if arguments.skip_checks:
        return checks
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda"]
    checks["tests"] = step("tests", tests, out)
    if not re.search(r"\d+ passed", str(checks["tests"]["summary"])):  # all skipped is no pass
        checks["tests"]["ok"] = False
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            checks[tool] = {"ok": None, "seconds": 0, "summary": "compute-sanitizer is not installed"}
            continue
        # Driver functions that a library looks for in vain are no errors of ours, nor are torch's own races.
        options = ["--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no"]
        options += ["--kernel-name", "kernel_substring=miwv"] if tool == "racecheck" else []
        command = [sanitizer, *options, python, "benchmarks/gpu_sanitize.py"]
        checks[tool] = step(tool, command, out, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return checks


def architecture() -> str:
    """Of this GPU alone, which saves minutes; as in the list of CMakeLists.txt."""
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}-real"


def step(name: str, command: list[str], out: Path, variables: dict[str, str] | None = None) -> dict[str, object]:
    begin = time.monotonic()
    log = out / f"gpu-{name}.log"
    with log.open("w") as stream:
        status = subprocess.run(
            command, cwd=ROOT, env=os.environ | (variables or {}), stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    result = {"ok": status == 0, "seconds": round(time.monotonic() - begin, 1), "summary": lines[-1].strip("= ")}
    print(f"{name}: {result}", flush=True)
    return result


# ---- Times


def run(
    cases: list[Case], arguments: argparse.Namespace, report: dict[str, object], path: Path
) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Times the cases, one storage for each vocabulary and type; the file is there after each case."""
    device = torch.device("cuda", 0)
    timer = Timer(device)
    done: list[dict[str, object]] = []
    left_out: list[dict[str, object]] = []
    group, storage = None, torch.empty(0)
    bounds: dict[int, tuple[float, float]] = {}
    for number, case in enumerate(cases):
        shape = {key: case.as_json()[key] for key in ("kernel", "dtype", "vocab", "rows", "density", "view")}
        if time.monotonic() - arguments.begin > 60 * arguments.minutes:
            left_out.append(shape | {"reason": "out of time"})
            continue
        try:
            if group != (case.dtype, case.vocab):
                group, storage = None, torch.empty(0)
                torch.cuda.empty_cache()
                wanted = case.dtype, case.vocab
                most = max(other.rows for other in cases if (other.dtype, other.vocab) == wanted)
                storage = torch.empty((most + 4) * case.vocab, dtype=DTYPES[case.dtype], device=device).normal_(0, 3)
                group = wanted
            measure(case, problem_of(case, storage, number), timer, not arguments.no_peers, bounds)
        except torch.OutOfMemoryError as error:
            left_out.append(shape | {"reason": str(error).splitlines()[0]})
            torch.cuda.empty_cache()
            continue
        done.append(case.as_json())
        print(line(done[-1]), flush=True)
        path.write_text(json.dumps(report | {"cases": done}, indent=1) + "\n")
    return done, left_out


def run_head(arguments: argparse.Namespace, report: dict[str, object], path: Path) -> list[dict[str, object]]:
    """The head without logits, in slices of several sizes; the file is there after each case."""
    device = torch.device("cuda", 0)
    timer, done = Timer(device, pause=4_000_000), []
    for case in head_cases():
        if time.monotonic() - arguments.begin > 60 * arguments.minutes:
            break
        try:
            done.append(measure_head(case, timer, device))
        except torch.OutOfMemoryError as error:
            done.append(case | {"reason": str(error).splitlines()[0]})
        torch.cuda.empty_cache()
        print(done[-1], flush=True)
        path.write_text(json.dumps(report | {"head": done}, indent=1) + "\n")
    return done


def run_model(arguments: argparse.Namespace) -> dict[str, object] | None:
    """The end-to-end pass, in a process of its own, so that its memory is its own; what it printed last if it fails."""
    if not arguments.records or time.monotonic() - arguments.begin > 60 * arguments.minutes:
        return None
    out = arguments.out / "gpu-model.json"
    command = [sys.executable, "benchmarks/gpu_model.py", "--records", str(arguments.records), "--output", str(out)]
    result = step("model", command, arguments.out)
    return json.loads(out.read_text()) if result["ok"] else result


def run_end_to_end(arguments: argparse.Namespace) -> dict[str, object] | None:
    """The whole job beside plain transformers and, where a checkout is given, OpenDataArena; on MIWV_DATA's records."""
    if not arguments.peer_records or time.monotonic() - arguments.begin > 60 * arguments.minutes:
        return None
    if "MIWV_DATA" not in os.environ:
        return {"ok": None, "seconds": 0, "summary": "MIWV_DATA names no folder with records"}
    out = arguments.out / "gpu-end-to-end.json"
    command = [sys.executable, "benchmarks/end_to_end.py", "--device", "cuda", "--shape", "7b"]
    command += ["--records", str(arguments.peer_records), "--ways", "ours", "ours_unshared", "plain"]
    command += ["--oda", str(arguments.oda.resolve())] if arguments.oda else []
    result = step("end-to-end", [*command, "--output", str(out)], arguments.out)
    return json.loads(out.read_text()) if result["ok"] else result


def table(cases: list[dict[str, object]]) -> str:
    """All rows scored, contiguous, as ops would do it: what a README shows."""
    chosen = [
        case
        for case in cases
        if case["density"] == 1 and case["view"] == "contiguous" and case["dtype"] == "bfloat16" and case["automatic"]
    ]
    rule = "|---|---|---|---|---|---|---|---|"
    return "\n".join(["| kernel | V | rows | µs | GB/s | of copy | of read | fastest peer |", rule, *map(line, chosen)])


def line(case: dict[str, object]) -> str:
    name = f"| {case['kernel']} | {case['vocab']} | {case['rows']}"
    if case["density"] != 1 or case["view"] != "contiguous" or case["dtype"] != "bfloat16":
        name += f", {case['dtype']}, density {case['density']}, {case['view']}"
    if case["seconds"] is None:
        return name + " | | | | | |"
    peers = sorted(case["peers"].items(), key=lambda item: item[1])
    best = f"{peers[0][0]} {peers[0][1] / case['seconds']:.2f}×" if peers else ""
    rate = case["bytes"] / case["seconds"] / 1e9
    return (
        f"{name} | {case['seconds'] * 1e6:.1f} | {rate:.0f} | {case['fraction_of_copy']:.3f} | "
        f"{case['fraction_of_read']:.3f} | {best} |"
    )


if __name__ == "__main__":
    sys.exit(main())
