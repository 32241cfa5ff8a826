"""Two runs over the same data side by side: how far their rankings agree, and on which records they do not."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from miwv_fast import ranker
from miwv_fast.scores import Scores
from miwv_fast.shapes import parse_record
from miwv_fast.terminal import is_terminal, printable

SHARES = ("1%", "5%", "10%")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """How far two runs agree.

    `records`: how many have a score in both. `spearman`: the rank correlation of their MIWV, NaN where one run gives
    all of them the same score. `overlap`: for the top 1, 5 and 10 % of all input records, the share of the first run's
    selection that the second makes too. `moved`: a row per record scored in both, the one that moved most first:
    `index` int64; `rank_a`, `rank_b` int64, its place among these records, from 1; `miwv_a`, `miwv_b` float32, nats
    per token.
    """

    records: int
    spearman: float
    overlap: Mapping[str, float]
    moved: pa.Table


def compare(a: Scores, b: Scores) -> Comparison:
    """Compares two runs over the same data, made with other models, templates, embedders or settings.

    Raises ValueError if they are of different data, or if no two records have a score in both, TypeError for anything
    but `Scores`.
    """
    for scores in (a, b):
        if not isinstance(scores, Scores):
            raise TypeError(
                f"compare takes scores, this is {scores!r:.80}; load_scores reads them from a run or a file"
            )
    _require_same_data(a, b)
    miwv = [scores.table["miwv"].to_numpy(zero_copy_only=False).astype(np.float64) for scores in (a, b)]
    both = np.flatnonzero(~np.isnan(miwv[0]) & ~np.isnan(miwv[1]))
    if len(both) < 2:
        raise ValueError(f"{len(both)} records have a score in both runs: nothing to compare")
    ranks = [_places(values[both]) for values in miwv]
    order = np.argsort(-np.abs(ranks[0] - ranks[1]), kind="stable")
    columns = {"index": both[order], "rank_a": ranks[0][order] + 1, "rank_b": ranks[1][order] + 1}
    columns |= {
        name: values[both][order].astype(np.float32) for name, values in zip(("miwv_a", "miwv_b"), miwv, strict=True)
    }
    overlap = {share: _overlap(a, b, ranker.selection_size(share, len(a))) for share in SHARES}
    return Comparison(len(both), spearman(miwv[0][both], miwv[1][both]), overlap, pa.table(columns))


def show_comparison(comparison: Comparison, scores: Scores, count: int = 10) -> None:
    """Prints a comparison and the `count` records that moved most, with their text where `scores` finds it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(f"{comparison.records:,} records scored in both, rank correlation {comparison.spearman:+.3f} (Spearman)")
    for share, overlap in comparison.overlap.items():
        print(f"top {share}: {100 * overlap:.0f} % in common")
    moved = [row for row in comparison.moved.slice(0, count).to_pylist() if row["rank_a"] != row["rank_b"]]
    if not moved:
        print("no record has another rank")
        return
    table = Table(title="What moved most", title_justify="left", expand=True)
    for name in ("record", "rank in A", "in B", "MIWV in A", "in B"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, ratio=1)
    texts = _prompts(scores, [row["index"] for row in moved])
    for row, text in zip(moved, texts, strict=True):
        numbers = (f"{row['rank_a']:,}", f"{row['rank_b']:,}", f"{row['miwv_a']:+.3f}", f"{row['miwv_b']:+.3f}")
        table.add_row(str(row["index"]), *numbers, Text(text))
    Console(width=None if is_terminal(sys.stdout) else 120).print(table)


def _prompts(scores: Scores, numbers: list[int]) -> list[str]:
    """The beginning of each record's prompt, empty where the data is not at hand."""
    if scores.source is None:
        return [""] * len(numbers)
    try:
        rows = scores.rows(numbers)
    except ValueError as error:
        _log.warning("no texts are shown: %s", error)
        return [""] * len(numbers)
    prompts = (" ".join(parse_record(row).turns[0].prompt.split()) for row in rows)
    return [printable(prompt[:200]) for prompt in prompts]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The rank correlation of two arrays [N], ties at their mean rank; NaN where one of them is constant."""
    ranks = [_mean_ranks(values) for values in (x, y)]
    if any(values.min() == values.max() for values in ranks):
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    ends = [pc.rank(pa.array(values), tiebreaker=tiebreaker).to_numpy() for tiebreaker in ("min", "max")]
    return np.asarray(np.mean(ends, axis=0))


def _places(miwv: np.ndarray) -> np.ndarray:
    places = np.empty(len(miwv), np.int64)
    places[ranker.rank(miwv)] = np.arange(len(miwv))
    return places


def _overlap(a: Scores, b: Scores, size: int) -> float:
    best = [scores.rank()[: min(size, len(scores) - scores.table["miwv"].null_count)] for scores in (a, b)]
    return len(np.intersect1d(best[0], best[1])) / len(best[0])


def _require_same_data(a: Scores, b: Scores) -> None:
    if len(a) != len(b):
        raise ValueError(f"these runs are of different data: {len(a)} records and {len(b)}")
    texts = [scores.manifest.get("texts") for scores in (a, b)]
    if None not in texts:
        if texts[0] != texts[1]:
            raise ValueError("these runs are of different data: the texts that were scored differ")
        return
    contents = [_contents(scores.manifest.get("data", {})) for scores in (a, b)]
    if contents[0] and contents[1] and contents[0][0] == contents[1][0] and contents[0] != contents[1]:
        raise ValueError(f"these runs are of different data: the {contents[0][0]} of what was scored differs")
    ids = [scores.table["id"].combine_chunks() for scores in (a, b)]
    if not ids[0].equals(ids[1]):
        raise ValueError("these runs are of different data: the records' ids differ")


def _contents(data: Mapping[str, Any]) -> tuple[str, Any] | None:
    """What identifies the data in a manifest, wherever it lay; two kinds of identity cannot be compared."""
    if "files" in data:
        return "SHA-256", [file["sha256"] for file in data["files"]]
    for key, name in (("sha256", "SHA-256 of the records"), ("data_set", "name"), ("fingerprint", "fingerprint")):
        if data.get(key) is not None:
            return name, data[key]
    return None
