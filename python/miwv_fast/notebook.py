"""How scores show themselves in a notebook: a summary in HTML, and two plots."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from miwv_fast import ranker
from miwv_fast.extras import import_extra

if TYPE_CHECKING:
    from miwv_fast.scores import Scores

_SHOWN = 5
_MAX_BINS = 120


def summary_html(scores: Scores) -> str:
    """How many records have each status, and the numbers of the five best and the five worst, as HTML."""
    counts = ", ".join(f"{count:,} {status}" for status, count in scores.counts().items())
    parts = [f"<p><b>{len(scores):,} records</b>: {escape(counts)}</p>"]
    ranking = scores.rank()[: len(scores) - scores.table["miwv"].null_count]
    places = sorted({*range(min(_SHOWN, len(ranking))), *range(max(0, len(ranking) - _SHOWN), len(ranking))})
    if places:
        names = ("rank", "record", "id", "MIWV", "one-shot", "zero-shot", "tokens", "similarity")
        rows = scores.table.take(ranking[places]).to_pylist()
        body = "".join(_row("td", _cells(place, row)) for place, row in zip(places, rows, strict=True))
        parts.append(f"<table><thead>{_row('th', names)}</thead><tbody>{body}</tbody></table>")
        parts.append("<p>Losses and MIWV in nats per token; higher MIWV is better.</p>")
    return f"<div>{''.join(parts)}</div>"


def _cells(place: int, row: dict[str, Any]) -> list[str]:
    losses = (f"{row['miwv']:+.3f}", f"{row['nll_one_shot']:.3f}", f"{row['nll_zero_shot']:.3f}")
    similarity = "" if row["similarity"] is None else f"{row['similarity']:.3f}"
    return [f"{place + 1:,}", str(row["index"]), row["id"] or "", *losses, f"{row['response_tokens']:,}", similarity]


def _row(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def plot(scores: Scores, top: str | float | int) -> np.ndarray:
    """The distribution of MIWV, and one-shot against zero-shot loss, the selection marked in both."""
    pyplot = import_extra("matplotlib.pyplot", "report")
    scored = scores.table.filter(scores.table["miwv"].is_valid())
    if not len(scored):
        raise ValueError("no record has a score: there is nothing to plot")
    miwv, one, zero = (scored[name].to_numpy() for name in ("miwv", "nll_one_shot", "nll_zero_shot"))
    size = min(ranker.selection_size(top, len(scores)), len(miwv))
    best = np.zeros(len(miwv), bool)
    best[ranker.rank(miwv)[:size]] = True
    threshold = miwv[best].min()
    _, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    axes[0].hist(miwv, bins=bin_count(miwv))
    axes[0].axvline(threshold, color="C1")
    axes[0].set(xlabel="MIWV (nats per token)", ylabel="records")
    axes[0].set_title(f"{size:,} of {len(scores):,} records have a MIWV of at least {threshold:+.3f}")
    for chosen, color, label in ((~best, "C0", "not selected"), (best, "C1", "selected")):
        axes[1].scatter(
            zero[chosen], one[chosen], s=8, color=color, alpha=0.5, linewidths=0, label=label, rasterized=True
        )
    axes[1].axline((zero[0], zero[0]), slope=1, color="gray", linewidth=1)
    axes[1].set(xlabel="zero-shot loss (nats per token)", ylabel="one-shot loss (nats per token)")
    axes[1].legend()
    return np.asarray(axes)


def bin_count(values: np.ndarray) -> int:
    """How many bins of a histogram of the values [N]: by the rule of Freedman and Diaconis, 1 to 120."""
    first, third = np.quantile(values, [0.25, 0.75])
    width = 2 * (third - first) / len(values) ** (1 / 3)
    # Where nearly all values are the same, the rule would ask for billions.
    return int(min(_MAX_BINS, max(1, np.ceil(np.ptp(values) / width)))) if width > 0 else 1
