"""What the report says about a run in words: its title, its key numbers, how the scores came about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miwv_fast.scores import Scores


def describe(scores: Scores, page: Mapping[str, Any]) -> dict[str, Any]:
    """The texts around plots and table, by their names in the template."""
    scored, drawn = page["scored"], page["drawn"]
    rejected, listed = len(scores) - scored, len(page["rejected"])
    views = [("top", "Best"), ("bottom", "Worst"), ("rejected", "Rejected"), ("all", "All")]
    note = "Open a record to read it. Best and worst"
    note += (
        f" are the {page['extremes']} at either end" if scored > 2 * page["extremes"] else " list all scored records"
    )
    note += f"; {listed} of {rejected:,} rejected records are listed." if listed < rejected else "."
    return {
        "title": _data_name(scores.manifest),
        "tiles": _tiles(scores),
        "facts": _facts(scores),
        "views": [view for view in views if view[0] != "rejected" or rejected],
        "table_note": note,
        "note": "" if page["texts"] else "The data was not found when this report was made, so it holds no texts.",
        "drawn_note": ""
        if drawn == scored
        else f"{drawn:,} of {scored:,} scored records are drawn and listed, evenly spaced in the ranking; counts, "
        "threshold and shares are those of all records.",
    }


def _tiles(scores: Scores) -> list[tuple[str, str]]:
    miwv = scores.table["miwv"].drop_null().to_numpy()
    return [
        ("Records", f"{len(scores):,}"),
        ("Scored", f"{len(miwv):,}"),
        ("Median MIWV", f"{np.median(miwv):+.3f} nats per token".replace("-", "−")),
        ("MIWV above 0", f"{100 * np.mean(miwv > 0):.1f} %"),
        ("Median response", f"{np.median(scores.table['response_tokens'].drop_null().to_numpy()):.0f} tokens"),
    ]


def _facts(scores: Scores) -> list[tuple[str, str]]:
    """What the manifest tells, where there is one."""
    manifest = scores.manifest
    facts = [("Status", ", ".join(f"{count:,} {status}" for status, count in scores.counts().items()))]
    for label, value in (
        ("Model", _without_folders(manifest.get("model", {}).get("name"))),
        ("Template", _without_folders(manifest.get("template", {}).get("name"))),
        ("Embedder", _without_folders(manifest.get("embedder"))),
        ("Demonstrations per record", manifest.get("neighbors")),
        ("Longest sequence", manifest.get("max_length") and f"{manifest['max_length']:,} tokens"),
        ("Computed on", manifest.get("device") and f"{manifest['device']}, {manifest.get('dtype')}"),
        ("Versions", ", ".join(f"{name} {v}" for name, v in manifest.get("versions", {}).items() if v)),
    ):
        if value:
            facts.append((label, str(value)))
    return facts


def _data_name(manifest: Mapping[str, Any]) -> str:
    data = manifest.get("data", {})
    if data.get("files"):
        return ", ".join(Path(file["path"]).name for file in data["files"])
    return str(data.get("data_set") or "Instruction records")


def _without_folders(name: str | None) -> str | None:
    """A name as it is; of a path its last two parts, since a report is handed on and says nothing of a machine."""
    return "/".join(Path(name).parts[-2:]) if name and Path(name).is_absolute() else name
