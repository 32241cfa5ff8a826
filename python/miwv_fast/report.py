"""The report: one HTML file that shows a run's scores, needs no network, and opens from disk."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miwv_fast import ranker
from miwv_fast.explain import Explainer
from miwv_fast.extras import import_extra
from miwv_fast.files import write_atomically
from miwv_fast.formats import Row
from miwv_fast.report_records import FieldFinder, Grouping, describe_record, page_json, take_within
from miwv_fast.report_text import describe
from miwv_fast.scores import Scores

EXTREMES = 300
EXPLAINED = 10
_EXPLAINED_TOKENS = 600
# Of larger data, records evenly spaced in the ranking are drawn; counts and shares stay those of all records.
_DRAWN = 100_000
_TEXT_BYTES = 4_000_000
_SCRIPTS = ("data.js", "plots.js", "records.js", "page.js")

if TYPE_CHECKING:
    from miwv_fast.report_figures import Plot

_log = logging.getLogger(__name__)


def write_report(
    scores: Scores,
    path: str | os.PathLike[str],
    *,
    top: str | float | int = "1%",
    field: str | None = None,
    data: object = None,
    model: Any = None,
    tokenizer: Any = None,
    device: str = "auto",
) -> None:
    """Writes the report of `scores` to `path`; `Scores.report` says what the arguments are and what is raised."""
    figures = import_extra("miwv_fast.report_figures", "report")
    miwv = scores.table["miwv"].to_numpy(zero_copy_only=False).astype(np.float64)
    ranking = ranker.rank(miwv)[: len(scores) - scores.table["miwv"].null_count]
    if not len(ranking):
        raise ValueError("no record has a score: there is nothing to report")
    rejected = np.flatnonzero(np.isnan(miwv))
    selected = min(ranker.selection_size(top, len(scores)), len(ranking))
    shown = list(_shown(scores, ranking, rejected))
    rows, grouping = _read(scores, data, field, {number for numbers in shown for number in numbers})
    texts = {number: describe_record(row) for number, row in rows.items()}
    explainer = Explainer(scores.manifest, model, tokenizer, device) if rows and model is not None else None
    columns = _columns(scores, ranking)
    plots = figures.make_plots(columns, miwv[ranking])
    page = {
        "records": len(scores),
        "scored": len(ranking),
        "drawn": len(columns["rank"]),
        "selected": selected,
        "extremes": EXTREMES,
        "statuses": list(scores.counts()),
        "columns": {name: _pack(values) for name, values in columns.items()},
        "field": None if grouping is None else _describe_grouping(grouping, ranking),
        "texts": take_within(shown, texts, _TEXT_BYTES),
        "rejected": _rejected(scores, rejected[:EXTREMES], grouping),
        "explanations": _explain(scores, ranking, rows, explainer) if explainer else {},
        "figures": {plot.name: {"item": plot.item, "x": plot.x, "y": plot.y} for plot in plots},
    }
    html = _render(scores, page, plots, figures.library())
    write_atomically(Path(path), lambda out: out.write_bytes(html))


def _shown(scores: Scores, ranking: np.ndarray, rejected: np.ndarray) -> Iterator[list[int]]:
    """Records to show in full, each with its demonstration: best, worst and rejected in turn."""
    neighbor = scores.table["neighbor"].fill_null(-1).to_numpy()
    for place in range(min(EXTREMES, max(len(ranking), len(rejected)))):
        for numbers in (ranking, ranking[::-1], rejected):
            if place < len(numbers):
                yield [n for n in (int(numbers[place]), int(neighbor[numbers[place]])) if n >= 0]


def _read(scores: Scores, data: object, field: str | None, wanted: set[int]) -> tuple[dict[int, Row], Grouping | None]:
    """The wanted rows, and the field that groups all of them."""
    if scores.source is None and data is None:
        if field is not None:
            raise ValueError(f"field {field!r}: the scored data was not found; say where it is with data (--data)")
        _log.warning("the scored data was not found, so the report has no texts; say where it is with data (--data)")
        return {}, None
    finder = FieldFinder(field)
    rows = {}
    for number, row in enumerate(scores.read_rows(data)):
        finder.add(row.value)
        if number in wanted:
            rows[number] = row
    return rows, finder.result()


def _columns(scores: Scores, ranking: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of the scored records in rank order; of more than 100,000 a part, evenly spaced."""
    step = -(-len(ranking) // _DRAWN)
    ends = np.arange(min(EXTREMES, len(ranking)))
    rank = np.unique(np.concatenate([np.arange(0, len(ranking), step), ends, len(ranking) - 1 - ends]))
    table = scores.table.take(ranking[rank])
    statuses = list(scores.counts())
    columns = {"rank": rank.astype(np.int32), "record": ranking[rank].astype(np.int32)}
    for name, column in (("miwv", "miwv"), ("one", "nll_one_shot"), ("zero", "nll_zero_shot")):
        columns[name] = table[column].to_numpy().astype(np.float32)
    columns["similarity"] = table["similarity"].to_numpy().astype(np.float32)
    columns["tokens"] = table["response_tokens"].to_numpy().astype(np.int32)
    columns["neighbor"] = table["neighbor"].to_numpy().astype(np.int32)
    columns["status"] = np.array([statuses.index(status) for status in table["status"].to_pylist()], np.uint8)
    return columns


def _pack(values: np.ndarray) -> dict[str, str]:
    little = values.astype(values.dtype.newbyteorder("<"))
    return {"type": values.dtype.str[1:], "base64": base64.b64encode(little.tobytes()).decode()}


def _describe_grouping(grouping: Grouping, ranking: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(grouping.codes, minlength=len(grouping.values)).tolist()
    return {
        "name": grouping.name,
        "values": grouping.values,
        "counts": counts,
        "codes": _pack(grouping.codes[ranking]),
    }


def _rejected(scores: Scores, numbers: np.ndarray, grouping: Grouping | None) -> list[dict[str, Any]]:
    statuses = scores.table["status"].take(numbers).to_pylist()
    rows = [{"record": int(n), "status": status} for n, status in zip(numbers, statuses, strict=True)]
    if grouping is not None:
        for row in rows:
            row["group"] = int(grouping.codes[row["record"]])
    return rows


def _render(scores: Scores, page: dict[str, Any], plots: list[Plot], library: str) -> bytes:
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    assets = files("miwv_fast") / "assets"
    own = "\n".join((assets / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    scripts = [text.replace("</script", "<\\/script") for text in (library, own)]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    environment = Environment(autoescape=True, loader=PackageLoader("miwv_fast", "assets"))
    html = environment.get_template("report.html.jinja").render(
        # Nothing is loaded, and no script runs but these two, whatever the data holds.
        policy=Markup(f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:"),
        style=Markup((assets / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text in scripts],
        data=Markup(page_json(page)),
        plots=plots,
        field=page["field"] and page["field"]["name"],
        **describe(scores, page),
    )
    return html.encode(errors="backslashreplace")


def _explain(scores: Scores, ranking: np.ndarray, rows: Mapping[int, Row], explainer: Explainer) -> dict[str, Any]:
    """The best and the worst records token by token, by record number."""
    explanations = {}
    for number in dict.fromkeys([*ranking[:EXPLAINED].tolist(), *ranking[-EXPLAINED:].tolist()]):
        [row] = scores.table.slice(number, 1).to_pylist()
        told = explainer(rows[number].value, rows[row["neighbor"]].value, row)
        kept = slice(_EXPLAINED_TOKENS)
        explanations[str(number)] = {
            "tokens": told.tokens[kept],
            "one": [round(float(nats), 3) for nats in told.one_shot[kept]],
            "zero": [round(float(nats), 3) for nats in told.zero_shot[kept]],
            "left": max(0, len(told.tokens) - _EXPLAINED_TOKENS),
        }
    return explanations
