"""A whole scoring pass over a data set's lengths with a large model of random weights: its speed and share of peak.

    python benchmarks/gpu_model.py --records 52002 --output benchmarks/results/gpu_model.json
    python benchmarks/gpu_model.py --device cpu --shape tiny --records 200                     tries it without a GPU

Lengths are those of Alpaca's records, four characters to a token, where MIWV_DATA names its folder; otherwise drawn
like them. Demonstrations are drawn at random, so that 63 % of the records have children (55 % in Alpaca). Nothing is
tokenized: tokens are random. Scored are the responses, by the units, batches and kernels of `miwv_fast.score`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

# hidden, layers, heads, key-value heads, MLP, V
SHAPES = {
    "7b": (4096, 32, 32, 32, 11008, 32000),
    "8b": (4096, 32, 32, 8, 14336, 128256),
    "1b": (2048, 22, 32, 4, 5632, 32000),
    "tiny": (64, 2, 4, 2, 128, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=52002)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--no-share-prefix", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = measure_model(
        arguments.shape,
        arguments.records,
        torch.device(arguments.device),
        arguments.batch_tokens,
        not arguments.no_share_prefix,
    )
    given = re.sub(r" --output[= ]\S+", "", " ".join(["", *sys.argv[1:]]))
    result = {"command": f"python benchmarks/gpu_model.py{given}"} | result
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Lengths:
    """Token sequences of given lengths, as `Runner` asks for them; record i demonstrates with `demonstration[i]`."""

    prompt: np.ndarray
    response: np.ndarray
    demonstration: np.ndarray
    tokens: np.ndarray

    def _sequence(self, ids: np.ndarray, scored_from: int) -> Any:
        from miwv_fast.assembly import TokenSequence

        rows = np.arange(scored_from - 1, len(ids) - 1, dtype=np.int32)
        return TokenSequence(ids, rows, ids[rows + 1])

    def _own(self, record: int) -> np.ndarray:
        return self.tokens[record : record + int(self.prompt[record] + self.response[record])]

    def _zero_shot(self, record: int) -> Any:
        return self._sequence(self._own(record), int(self.prompt[record]))

    def _one_shot(self, number: int) -> Any:
        before = self._own(int(self.demonstration[number]))
        both = np.concatenate([before, self._own(number)])
        return self._sequence(both, len(before) + int(self.prompt[number]))

    def trees(self, unit: Any) -> Any:
        """The sequences of a unit, children as what follows their demonstrations."""
        from miwv_fast.runner import Trees

        place = {root: place for place, root in enumerate(unit.roots.tolist())}
        roots = [self._zero_shot(record) for record in unit.roots.tolist()]
        roots = [root.prefix(len(root.rows) * int(scored)) for root, scored in zip(roots, unit.scored, strict=True)]
        behind = self.demonstration[unit.children].tolist()
        children = [
            self._one_shot(number).behind(len(self._own(demonstration)))
            for number, demonstration in zip(unit.children.tolist(), behind, strict=True)
        ]
        alone = [*map(self._zero_shot, unit.zero_shot.tolist()), *map(self._one_shot, unit.one_shot.tolist())]
        parents = [-1] * len(roots) + [place[demonstration] for demonstration in behind] + [-1] * len(alone)
        return Trees([*roots, *children, *alone], np.array(parents, np.int64))


def measure_model(
    shape: str, records: int, device: torch.device, batch_tokens: int | None = None, share: bool = True
) -> dict[str, Any]:
    """One pass over all units; what it took, and how that compares with the device's own matrix products."""
    from miwv_fast.forest import Passes, plan_units
    from miwv_fast.info import package_versions
    from miwv_fast.job import UNIT_BATCHES
    from miwv_fast.model import CausalLM
    from miwv_fast.runner import Runner

    lm = CausalLM(make_model(shape, device), None, f"{shape} of random weights")
    budget = batch_tokens or lm.default_batch_tokens()
    runner = Runner(lm, budget)
    lengths = make_lengths(records, lm.vocab_size)
    zero = lengths.prompt + lengths.response
    one = zero + zero[lengths.demonstration]
    parents = lengths.demonstration if share else np.full(records, -1)
    passes = Passes(zero, one, zero, np.full(records, -1), parents)
    units = plan_units(passes, cache_tokens=runner.cache_tokens(), unit_tokens=UNIT_BATCHES * budget)
    runner.run(units[-1], lengths, lambda tokens: None)  # kernels are loaded and tuned
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin, cpu = time.perf_counter(), time.process_time()
    padding = 0
    for unit in units:
        result = runner.run(unit, lengths, lambda tokens: None)
        assert np.isfinite(result.zero_shot[1]).all() and np.isfinite(result.one_shot[1]).all()
        padding += result.padding_tokens
    synchronize(device)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    tokens = sum(map(passes.forwarded_tokens, units))
    scored = 2 * int(lengths.response.sum())
    operations = 2 * body_parameters(lm) * tokens + 2 * lm.model.lm_head.weight.numel() * scored
    peak = product_rate(device, lm.model.dtype)
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": package_versions(("miwv-fast", "torch", "transformers")),
        "shape": dict(zip(("hidden", "layers", "heads", "kv_heads", "mlp", "vocab"), SHAPES[shape], strict=True)),
        "records": records,
        "share_prefix": share,
        "batch_tokens": budget,
        "units": len(units),
        "forwarded_tokens": int(tokens),
        "two_plain_passes_tokens": int(zero.sum() + one.sum()),
        "padding_share": padding / tokens,
        "seconds": seconds,
        "host_cpu_seconds": cpu,
        "tokens_per_second": tokens / seconds,
        "records_per_second": records / seconds,
        "tflops": operations / seconds / 1e12,
        "matrix_product_tflops": peak / 1e12,
        "fraction_of_matrix_product": operations / seconds / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def make_model(shape: str, device: torch.device) -> Any:
    import transformers

    hidden, layers, heads, kv_heads, mlp, vocab = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_lengths(records: int, vocab: int) -> Lengths:
    generator = np.random.default_rng(0)
    folder = os.environ.get("MIWV_DATA")
    if folder and (Path(folder) / "alpaca_52002.jsonl.xz").exists():
        from miwv_fast.sources import open_source

        rows = itertools.islice(open_source(Path(folder) / "alpaca_52002.jsonl.xz").rows(), records)
        sizes = [(len(row.value["instruction"] + row.value["input"]), len(row.value["output"])) for row in rows]
        prompt, response = (np.array(sizes) // 4 + [[40, 1]]).T  # the template's own text is some 40 tokens
    else:
        prompt = 40 + generator.gamma(2, 10, records).astype(np.int64)
        response = 1 + np.minimum(generator.lognormal(3.7, 1.1, records), 900).astype(np.int64)
    # A record never demonstrates for itself.
    demonstration = (np.arange(records) + generator.integers(1, records, records)) % records
    tokens = generator.integers(0, vocab, records + int((prompt + response).max()), dtype=np.int32)
    return Lengths(prompt, response, demonstration, tokens)


def body_parameters(lm: Any) -> int:
    """What every token is multiplied by: all but embeddings and head."""
    excluded = {id(lm.model.get_input_embeddings().weight), id(lm.model.get_output_embeddings().weight)}
    return sum(parameter.numel() for parameter in lm.model.parameters() if id(parameter) not in excluded)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the best of a few."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return max(2 * size**3 / timed(lambda: a @ b, device) for _ in range(10))


def timed(function: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
