"""benchmarks/gpu.py as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
VOCABS = {32000, 50257, 128256, 151936, 262144}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(GPU.parent)
    import gpu

    return gpu


@pytest.fixture
def run(gpu: ModuleType, tmp_path: Path) -> Any:
    """A run that has begun, with a minute left."""
    report = {"commit": None, "checks": {}, "cases": [], "head": [], "model": None, "job": None}
    return gpu.Run(gpu.parse(["--out", str(tmp_path), "--minutes", "1"]), report, tmp_path / "gpu-x.json")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def test_dry_run(tmp_path: Path) -> None:
    done = _python(str(GPU), "--dry-run", "--out", str(tmp_path), "--commit", "abc")
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert str(path) in done.stdout and "| kernel | V | rows |" in done.stdout
    assert {"command", "date", "device", "driver", "versions", "checks", "cases"} <= set(report)
    assert report["commit"] == "abc" and str(tmp_path) not in report["command"]
    assert len(report["head"]) == 62 and report["model"] is None
    keys = {"seconds", "bytes", "fraction_of_copy", "fraction_of_read", "launch_seconds", "peers", "left_out", "error"}
    shapes = set()
    for case in report["cases"]:
        assert keys <= set(case) and case["seconds"] is None and case["peers"] == {}
        shapes.add((case["vocab"], case["rows"], case["density"], case["view"]))
    assert len(shapes) == 5 * 5 * 3 * 2
    assert {case["bytes"] for case in report["cases"] if case["vocab"] == 50257 and case["rows"] == 1} == {2 * 50257}


def test_the_grid_times_what_ops_does_and_begins_with_the_main_cases(gpu: ModuleType) -> None:
    cases = list(gpu.grid())
    kernels: dict[bool, set[tuple[str, int]]] = {True: set(), False: set()}
    for case in cases:
        kernels[case.density == 1 and case.view == "contiguous"].add((case.kernel, case.rows))
    few, many = {1, 16, 256, 4096}, {16384}
    forced = {("row", rows) for rows in few | many} | {("split", rows) for rows in few}
    assert kernels[True] == forced | {("difference", rows) for rows in (256, 4096, 16384)}
    near = {(kernel, rows) for kernel in ("row", "split") for rows in (256, 4096, 16384)}
    assert kernels[False] == {("automatic", rows) for rows in few | many} | near
    main = [case.density == 1 and case.view == "contiguous" for case in cases]
    assert main == sorted(main, reverse=True) and {case.vocab for case in cases[: sum(main)]} == VOCABS


def test_both_ways_are_timed_around_the_threshold_of_ops(gpu: ModuleType) -> None:
    """Which splits less than 264 rows on an H100."""
    from gpu_cases import scored

    cases = list(gpu.grid((128256,)))
    for case in cases:
        case.seconds = {"row": 3e-6, "split": 2e-6}.get(case.kernel, 1e-6)
        case.automatic = case.kernel != ("split" if scored(case.rows, case.density) >= 264 else "row")
    head, _, *lines = gpu.split_table(cases).splitlines()
    assert head == "| whole over split: scored rows | V = 128256 |"
    stars = [f"| {rows} | 1.50* |" for rows in (1, 16, 128, 256)]
    assert lines == stars + [f"| {rows} | 1.50 |" for rows in (410, 1638, 2048, 4096)]
    assert len(list(gpu.grid())) < 250


def test_what_goes_wrong_with_a_case_is_noted_and_the_rest_goes_on(gpu: ModuleType, run: Any) -> None:
    import gpu_tables

    errors = [AssertionError("off by 3 nats"), RuntimeError("CUDA error\nmore"), torch.OutOfMemoryError("none left")]
    cases = run.report["cases"] = list(gpu.grid((32000,), (4096, 16)))[:5]
    seen = []

    def measure(case: Any) -> None:
        seen.append([case["error"] for case in json.loads(run.path.read_text())["cases"]] if seen else [])
        if len(seen) <= len(errors):
            raise errors[len(seen) - 1]
        case.seconds, case.fraction_of_copy, case.fraction_of_read = 1e-5, 0.5, 0.5

    gpu.each(run, cases, measure, gpu_tables.line)
    assert seen[3] == ["AssertionError: off by 3 nats", "RuntimeError: CUDA error", None, None, None]
    assert cases[2].left_out == "OutOfMemoryError: none left" and len(seen) == len(cases)
    assert [case["seconds"] for case in json.loads(run.path.read_text())["cases"]] == [None] * 3 + [1e-5] * 2
    wrong = gpu.failures(run.report)
    assert len(wrong) == 2 and "rows 4096" in wrong[0] and wrong[0].endswith("off by 3 nats")
    assert len(gpu.table(cases).splitlines()) == 2 + sum(case.seconds is not None for case in cases)


@pytest.fixture
def gpu_rows(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With inputs on the CPU."""
    import gpu_rows

    inputs = gpu_rows.inputs
    monkeypatch.setattr(gpu_rows, "inputs", lambda cases, device: inputs(cases, torch.device("cpu")))
    return gpu_rows


def test_inputs_are_the_same_whenever_they_are_made(gpu: ModuleType, gpu_rows: ModuleType) -> None:
    cases = list(gpu.grid((50, 70), (16,)))
    problem = gpu_rows.inputs(cases, None)
    first, last = problem(cases[0]), problem(cases[-1])
    again = gpu_rows.inputs(cases, None)(cases[0])
    assert first.full.shape[-1] == 50 and last.full.shape[-1] == 70
    assert first.full.equal(again.full) and first.full.std() > 2 and first.targets.equal(again.targets)


def test_a_peer_that_breaks_the_gpu_takes_nothing_that_was_measured(
    gpu: ModuleType, gpu_rows: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_cases

    good, lost, seen = gpu_rows.peers, [], []

    def synchronize() -> None:
        if lost:
            raise lost[0]

    def stray() -> None:
        lost.append(RuntimeError("CUDA error: an illegal memory access\nmore"))
        raise lost[0]

    def measure(case: Any, *_: Any) -> None:
        case.seconds, case.copy_seconds, case.read_seconds, case.launch_seconds = 1e-5, 1e-5, 1e-5, 1e-6
        gpu_cases.set_fractions(case)
        case.automatic = case.kernel != "split"

    def peers(problem: Any) -> dict[str, Any]:
        assert {case["seconds"] for case in json.loads(run.path.read_text())["cases"]} == {1e-5}
        seen.append(problem.full.shape[-1])
        names = {"good": good(problem)["torch_float32"], "wrong": lambda: lambda: problem.logits[..., 0]}
        return names if len(seen) < 8 else names | {"bad": lambda: stray, "late": None}

    monkeypatch.setattr(gpu_rows, "measure", measure)
    monkeypatch.setattr(gpu_rows, "peers", peers)
    monkeypatch.setattr(gpu_rows, "Timer", lambda device: lambda call, budget: 2e-5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    run.arguments.vocabs, run.arguments.rows = [70, 50], [16]
    gpu_rows.time_rows(run)
    gpu_rows.time_peers(run)
    cases = json.loads(run.path.read_text())["cases"]
    assert {(case["seconds"], case["error"], case["left_out"]) for case in cases} == {(1e-5, None, None)}
    assert seen == [70] * 6 + [50] * 2  # a compiler comes to each V once
    beside = [case for vocab in seen[::6] for case in run.report["cases"] if case.vocab == vocab and case.automatic]
    assert all(case.peers == {"good": 2e-5} and "off by" in case.peers_left_out["wrong"] for case in beside[:8])
    assert {case.peers_note for case in beside[:7]} == {None}
    assert beside[7].peers_left_out["bad"] == "RuntimeError: CUDA error: an illegal memory access"
    assert {case.peers_note for case in beside[8:]} == {"an earlier case has left the GPU unusable"}
    assert gpu_rows.line(beside[7]).endswith("| 1.0 | good 2.00×; RuntimeError: bad has left the GPU unusable |")
    assert all("| 10.0 |" in gpu_rows.line(case) for case in run.report["cases"])
    assert not gpu.failures(run.report) and len(gpu.table(run.report["cases"]).splitlines()) == 4


@pytest.fixture
def on_a_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CUDA functions that do nothing; what ops was told about splitting at each call that was timed."""
    import gpu_cases
    from miwv_fast import _core, ops

    def timer(call: Callable[[], object], budget: float = 0) -> float:
        call()
        told.append(ops.launch.cuda_split)
        return 1e-3

    told: list[int] = []
    monkeypatch.setattr(_core, "cuda_scratch_bytes", lambda shape, count, *_: int(count < 20), raising=False)
    for name, result in (("reset_peak_memory_stats", 0), ("memory_allocated", 0), ("max_memory_allocated", 4096)):
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_cases, "Timer", lambda *_, **__: timer)
    monkeypatch.setattr(gpu_cases, "readers", lambda source: {"sum": source.sum})
    return told


@pytest.mark.parametrize(
    ("kernel", "rows", "density", "timed_as", "split", "automatic"),
    [
        ("row", 16, 1.0, "row", 0, False),
        ("split", 16, 1.0, "split", 1, True),
        ("row", 256, 0.5, "row", 0, True),
        ("automatic", 256, 0.5, "row", -1, True),
        ("automatic", 16, 0.5, "split", -1, True),
        ("difference", 256, 1.0, "difference", -1, True),
    ],
)
def test_what_a_case_says_of_itself(
    gpu: ModuleType,
    on_a_cpu: list[int],
    kernel: str,
    rows: int,
    density: float,
    timed_as: str,
    split: int,
    automatic: bool,
) -> None:
    import gpu_cases

    case, bounds = gpu_cases.Case(kernel, "bfloat16", 100, rows, density, "contiguous"), {}
    problem = gpu_cases.problem_of(case, torch.randn((rows + 4) * 100).bfloat16())
    gpu_cases.measure(case, problem, gpu_cases.Timer(), bounds)
    assert (case.kernel, case.automatic, case.seconds, case.launch_seconds) == (timed_as, automatic, 1e-3, 1e-3)
    assert (case.fraction_of_copy, case.fraction_of_read, case.note, case.peers) == (0.5, 1, None, {})
    assert on_a_cpu[:4] == [split, -1, -1, -1] and list(bounds) == [case.bytes]


def test_slices_of_the_head_have_the_shape_of_the_case(gpu: ModuleType, on_a_cpu: list[int]) -> None:
    import gpu_cases
    import gpu_head
    from miwv_fast.ops import products

    cases = list(gpu.head_cases())
    shapes = {(case.slice_tokens, case.slice_bytes) for case in cases if case.vocab == 131072}
    assert shapes == {(count, mib << 20) for count in (1024, 2048, 4096) for mib in (16, 32, 64, 128, 256)}
    assert {case.slice_tokens for case in cases if case.vocab != 131072} == {4096}
    before = dict(products._SLICE_TOKENS), dict(products._SLICE_BYTES)
    seen = []
    case = gpu_head.HeadCase(300, 8, 192, 64, 16 << 10)

    def timer(call: Callable[[], object]) -> float:
        seen.append((products._SLICE_TOKENS["cuda"], products._SLICE_BYTES["cuda"]))
        return gpu_cases.Timer()(call)

    gpu_head.measure_head(case, timer, torch.device("cpu"))
    assert seen == [(64, 16 << 10), (before[0]["cuda"], before[1]["cuda"])]
    assert before == (products._SLICE_TOKENS, products._SLICE_BYTES)
    assert "| 300 | 8 | 192 | 64 | 0 | 1.000 |" in gpu.head_table([case])


def test_what_was_faster_than_a_bound_says_so(gpu: ModuleType) -> None:
    import gpu_cases
    import gpu_tables

    (case, *_), expected = gpu.grid((32000,), (16384,)), "really 1.030 of the read, which is no bound here"
    case.seconds, case.launch_seconds = 1e-3, 3e-6
    for read, note in ((1.01e-3, None), (1.03e-3, expected)):
        case.copy_seconds, case.read_seconds = 1.9e-3, read
        gpu_cases.set_fractions(case)
        assert (case.fraction_of_copy, case.fraction_of_read, case.note) == (pytest.approx(0.95), 1, note)
    assert gpu_tables.line(case).endswith(f"| 0.950 | 1.000 | 3.0 | {expected} |")


def test_programs_of_cuda_are_found_where_the_build_finds_nvcc(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("home", "path", "cuda"):
        program = tmp_path / folder / "bin" / "some-program"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    for name, folder in (("CUDA_HOME", "home"), ("CUDA_PATH", "cuda")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for gone, found in ((None, "home"), ("CUDA_HOME", "cuda"), ("CUDA_PATH", "path")):
        if gone:
            monkeypatch.delenv(gone)
        assert gpu.toolkit("some-program") == str(tmp_path / found / "bin" / "some-program")
    assert gpu.toolkit("no-such-program") is None


def problem_on_cpu(gpu_cases: ModuleType, density: float, view: str) -> Any:
    case = gpu_cases.Case("row", "float32", 100, 24, density, view)
    return gpu_cases.problem_of(case, torch.randn(28 * 100, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("view", ["contiguous", "[:, :-1]"])
def test_peers_are_called_as_they_ask_for(
    gpu: ModuleType, density: float, view: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL and Liger take whole sequences and a mask, and return zeros where it has them."""
    import gpu_cases
    import gpu_peers

    problem = problem_on_cpu(gpu_cases, density, view)
    batch, length = problem.logits.shape[:2]

    def masked(logits: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        assert index.shape == (batch, length) and (mask is None) == (density == 1)
        logprobs = logits.log_softmax(-1).gather(-1, index[:, :, None])[:, :, 0]
        return logprobs if mask is None else logprobs.masked_fill(mask == 0, 0.0)

    def of_trl(logits: torch.Tensor, index: torch.Tensor, *, row_mask: torch.Tensor | None = None) -> torch.Tensor:
        assert logits is problem.logits
        return masked(logits, index, row_mask)

    def of_liger(logits: torch.Tensor, ids: torch.Tensor, t: float, mask: torch.Tensor | None) -> torch.Tensor:
        assert logits is problem.full and t == 1
        return masked(logits[:, :-1], ids, mask)

    for module, attribute, function in (
        ("trl.trainer.utils", "selective_log_softmax", of_trl),
        ("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax", of_liger),
    ):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        setattr(sys.modules[module], attribute, function)
    for name in ("torch_float32", "liger", "trl"):
        gpu_cases.check_logprobs(gpu_peers.peers(problem)[name]()(), problem, 1e-5)


def test_cases_that_there_is_no_time_for(gpu: ModuleType, run: Any) -> None:
    run.arguments.minutes = 0
    gpu.each(run, cases := list(gpu.head_cases()), pytest.fail, str)
    assert {case.left_out for case in cases} == {"out of time"}


@dataclass
class Parts:
    """Parts that do nothing: which of them fail, and what the file had when each began."""

    failing: tuple[str, ...] = ()
    found: dict[str, dict[str, Any]] = field(default_factory=dict)


@pytest.fixture
def parts(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """In place of the real ones, and there seems to be a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda commit: {"device": "NVIDIA X1", "date": "today", "commit": commit})
    parts = Parts()

    def part(name: str) -> Callable[[Any], None]:
        def go(run: Any) -> None:
            parts.found[name] = json.loads(run.path.read_text()) if run.path.exists() else {}
            if name == "peers":
                parts.found[name] = json.loads(run.path.read_text())
            elif name in ("rows", "head"):
                run.report["cases" if name == "rows" else name] = list(
                    gpu.grid() if name == "rows" else gpu.head_cases()
                )
            else:
                where = run.report if name in gpu.TIMED else run.report["checks"]
                where[name] = {"ok": name not in parts.failing, "summary": f"{name} has run"}

        return go

    for name in gpu.PARTS:
        monkeypatch.setitem(gpu.PARTS, name, part(name))
    return parts


def test_the_file_is_there_after_each_part(gpu: ModuleType, parts: Parts, tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path), "--oda", str(tmp_path), "--commit", "abc"]) == 0
    found = parts.found
    assert list(found) == ["build", "tests", "sanitizer", "rows", "head", "model", "job", "peers"]
    assert list(found["tests"]["checks"]) == ["build"] and list(found["rows"]["checks"]) == list(found)[:3]
    assert found["head"]["cases"] and found["model"]["head"] and found["job"]["model"]["ok"]
    assert found["peers"]["job"]["ok"]
    report = json.loads((tmp_path / "gpu-x1-today.json").read_text())
    assert report["job"]["ok"] and report["command"] == "python benchmarks/gpu.py --oda CHECKOUT --commit abc"


@pytest.mark.parametrize(
    ("failing", "options", "expected"),
    [
        ("build", ["--keep-going"], ["build"]),
        ("tests", [], ["build", "tests", "sanitizer"]),
        ("tests", ["--keep-going", "--parts", "rows", "tests"], ["tests", "rows"]),
        ("model", ["--parts", "model", "job"], ["model", "job"]),
    ],
)
def test_what_follows_a_failure(
    gpu: ModuleType, parts: Parts, tmp_path: Path, failing: str, options: list[str], expected: list[str]
) -> None:
    parts.failing = (failing,)
    assert gpu.main(["--out", str(tmp_path), *options]) == 1
    assert list(parts.found) == expected
    timed = [name for name in expected if name in gpu.TIMED]
    (path,) = tmp_path.iterdir()
    assert path.name == "-".join(["gpu-x1-today", *(timed if "--parts" in options else [])]) + ".json"


def test_the_three_commands_of_the_readme(gpu: ModuleType, tmp_path: Path) -> None:
    """Together they do all parts, and none writes over another's file."""
    lines = GPU.with_name("README.md").read_text().splitlines()
    commands = [line.partition("benchmarks/gpu.py ")[2].split() for line in lines if "--parts" in line]
    parts: set[str] = set()
    for options in commands:
        options[options.index("DIR")] = str(tmp_path)
        parts.update(gpu.parse(options).parts)
        assert gpu.main([*options, "--dry-run"]) == 0
    assert parts == set(gpu.PARTS)
    date = json.loads(next(tmp_path.iterdir()).read_text())["date"]
    reports = {path.name.split(date)[1]: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    cases = {name: (len(report["cases"]), len(report["head"])) for name, report in reports.items()}
    assert cases == {"-rows.json": (215, 0), "-head-model.json": (0, 62), "-rows-job-peers.json": (86, 0)}


def test_peers_stand_beside_rows(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--parts", "build", "peers"])
    assert "needs rows" in capsys.readouterr().err


def test_a_step_that_takes_too_long_ends_with_all_that_it_has_started(gpu: ModuleType, run: Any) -> None:
    run.arguments.minutes = 2 / 60
    result = gpu.step(run, "slow", ["sh", "-c", "sleep 60 & echo $!; wait"])
    pid = (run.arguments.out / "gpu-x-slow.log").read_text().strip()
    assert not result["ok"] and "out of time" in result["summary"] and result["summary"].endswith(pid)
    stat, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert time.monotonic() < deadline
    assert gpu.step(run, "late", ["false"]) == {"ok": False, "seconds": 0, "summary": "not begun: out of time"}


@pytest.mark.parametrize(
    ("script", "options", "ok", "summary"),
    [
        ("echo 12 passed in 3 s; echo a last word", {"proof": r"\d+ passed"}, True, "12 passed in 3 s"),
        ("echo 12 skipped in 3 s", {"proof": r"\d+ passed"}, False, "12 skipped in 3 s"),
        ("echo 1 failed, 11 passed; false", {"proof": r"\d+ passed"}, False, "1 failed, 11 passed"),
        ("echo x.cu: error: no; echo pip; false", {"cause": "error:"}, False, "x.cu: error: no"),
        ("echo pip; false", {"cause": "error:"}, False, "pip"),
        ("echo error: none; echo built", {"cause": "error:"}, True, "built"),
        ("true", {}, True, ""),
    ],
)
def test_how_a_step_ended(
    gpu: ModuleType, run: Any, script: str, options: dict[str, str], ok: bool, summary: str
) -> None:
    result = gpu.step(run, "x", ["sh", "-c", script], **options)
    assert (result["ok"], result["summary"]) == (ok, summary)


@pytest.mark.parametrize("status", [0, 1])
def test_a_benchmark_that_fails_leaves_what_it_has_written(
    gpu: ModuleType, run: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Its file is read into the report and goes, since some machines give few files back."""
    import gpu_run

    script = "import sys; open(sys.argv[-1], 'w').write('{\"ways\": 3}'); sys.exit(int(sys.argv[1]))"
    (run.arguments.out / "benchmarks").mkdir()
    (run.arguments.out / "benchmarks" / "x.py").write_text(script)
    monkeypatch.setattr(gpu_run, "ROOT", run.arguments.out)
    result = gpu.benchmark(run, "x", ["x.py", str(status)])
    assert result["ways"] == 3 and result.get("ok", True) == (status == 0)
    assert {path.name for path in run.arguments.out.iterdir()} == {"benchmarks", "gpu-x-x.log"}


@pytest.fixture
def compiled(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.Tensor]]:
    import gpu_peers

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    options = {"recompile_limit": 8, "fail_on_recompile_limit_hit": False}
    with torch._dynamo.config.patch(options):
        yield gpu_peers.compiled(7)
    gpu_peers.compiled.cache_clear()
    torch._dynamo.reset()


def test_what_torch_compiles_no_more_is_left_out(compiled: Callable[..., torch.Tensor]) -> None:
    assert torch._dynamo.config.recompile_limit > 10
    torch._dynamo.config.recompile_limit = 1
    targets = torch.zeros(3, dtype=torch.int64)
    assert compiled(torch.zeros(3, 7), targets, None).shape == (3,)
    with pytest.raises(Exception, match="recompile_limit"):
        compiled(torch.zeros(3, 7, dtype=torch.bfloat16), targets, None)


def test_the_end_to_end_pass_on_a_cpu(tmp_path: Path) -> None:
    """A model of no size over the lengths of 300 records: the plan, the batches and the figures are the real ones."""
    arguments = ["--device", "cpu", "--shape", "tiny", "--records", "300", "--output", str(tmp_path / "model.json")]
    done = _python(str(GPU.with_name("gpu_model.py")), *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "model.json").read_text())
    assert 0.6 < result["forwarded_tokens"] / result["two_plain_passes_tokens"] < 0.75
    assert 0 < result["fraction_of_matrix_product"] < 1 and result["padding_share"] < 0.1
    assert str(tmp_path) not in result["command"]


@pytest.mark.slow
def test_the_whole_job_keeps_what_it_has_when_a_way_fails(real_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    arguments = ["--shape", "tiny", "--records", "12", "--threads", "1", "--ways", "ours", "--commit", "abc"]
    done = _python(str(GPU.with_name("end_to_end.py")), *arguments, "--oda", str(tmp_path), "--output", str(output))
    assert done.returncode == 1 and "MIWVScorer" in done.stderr
    result = json.loads(output.read_text())
    assert list(result["ways"]) == ["ours"] and result["ways"]["ours"]["forwarded_tokens"] > 1000
    assert result["commits"]["miwv_fast"] == "abc"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = _python(str(GPU), "--out", str(tmp_path))
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
