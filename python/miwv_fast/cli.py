"""The command line."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from miwv_fast.errors import Interrupted

app = typer.Typer(
    help="Score, rank and select instruction data by Model Instruction Weakness Value (MIWV).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for scores.parquet and selected.jsonl.")] = Path("miwv-demo"),
) -> None:
    """Scores 120 packaged records with SmolLM2-135M-Instruct on this machine, without any hub."""
    from miwv_fast.demo import run_demo

    run_demo(output)


@app.command()
def score(
    data: Annotated[
        list[str], typer.Argument(help="JSON, JSONL, CSV or Parquet files (also .gz, .xz, .zst), or a hub data set.")
    ],
    model: Annotated[str, typer.Option(help="Hub name, folder or GGUF file of a causal language model.")],
    output: Annotated[Path, typer.Option(help="Run folder to write: scores.parquet, manifest.json, rejected.jsonl.")],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, where it is not the model's own.")] = None,
    embedder: Annotated[
        str, typer.Option(help="sentence-transformers name or folder, or a .npy file with one row per record.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    template: Annotated[str, typer.Option(help="alpaca, plain, chat, or a Jinja file.")] = "alpaca",
    neighbors: Annotated[int, typer.Option(help="Demonstrations per record; the score is their mean.")] = 1,
    include_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence; default: what the model knows.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens per forward pass; default: automatic.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    share_prefix: Annotated[bool, typer.Option(help="Run one-shot passes behind kept demonstrations.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move a run that OUTPUT holds aside and start over.")] = False,
    progress: Annotated[bool | None, typer.Option(help="Progress bars; default: on a terminal.")] = None,
) -> None:
    """Scores every record of DATA and writes the scores to a run folder; the same command goes on after a stop.

    Example: miwv-fast score alpaca.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --output run
    """
    import miwv_fast

    scores = miwv_fast.score(
        data[0] if len(data) == 1 else data,
        model,
        tokenizer=tokenizer,
        embedder=_read_embeddings(embedder) if embedder.endswith(".npy") else embedder,
        template=template,
        neighbors=neighbors,
        include_eos=include_eos,
        max_length=max_length,
        batch_tokens="auto" if batch_tokens is None else batch_tokens,
        device=device,
        dtype=dtype,
        share_prefix=share_prefix,
        output=output,
        resume=not fresh,
        progress="auto" if progress is None else progress,
    )
    counts = ", ".join(f"{count} {status}" for status, count in scores.counts().items())
    typer.echo(f"{len(scores)} records: {counts}")
    tokens, seconds = scores.stats["forwarded_tokens"], scores.stats["scoring_seconds"]
    typer.echo(f"forwarded {tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s")
    typer.echo(f"wrote {output / 'scores.parquet'}; next: miwv-fast select {output} --top 1% --output subset.jsonl")


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="A run folder, or a scores file.")],
    output: Annotated[Path, typer.Option(help="JSONL file to write, best record first.")],
    top: Annotated[str, typer.Option(help="A share such as 1% or 0.01, or a number of records.")] = "1%",
    data: Annotated[list[str] | None, typer.Option(help="The scored data, if it has moved since.")] = None,
) -> None:
    """Writes the best records of a run, as they came."""
    from miwv_fast.scores import load_scores, write_jsonl

    scores = load_scores(run, data)
    rows = scores.select(top)
    write_jsonl(output, rows)
    typer.echo(f"wrote {len(rows)} of {len(scores)} records to {output}")


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Prints how far a run is, how fast, and what was rejected and why."""
    from miwv_fast.store import run_status

    told = run_status(run)
    of_units = "" if told["units"] is None else f" of {told['units']}"
    state = (
        "finished"
        if told["finished"]
        else f"being written by {told['written_by']}"
        if told["written_by"]
        else "stopped"
    )
    typer.echo(f"{state}: {told['units_done']}{of_units} units, {told['tokens_done']} tokens")
    if told["tokens_per_second"]:
        left = "" if told["finished"] or told["seconds_left"] is None else f", {told['seconds_left']:.0f} s left"
        typer.echo(f"{told['tokens_per_second']:.0f} tokens/s{left}")
    typer.echo(f"{sum(told['rejected'].values())} records rejected")
    for reason, count in list(told["rejected"].items())[:10]:
        typer.echo(f"  {count}: {reason}")


@app.command()
def info() -> None:
    """Prints versions, how the kernels were built, and what this machine offers."""
    import json

    import miwv_fast

    typer.echo(json.dumps(miwv_fast.info(), indent=2))


def main() -> None:
    """Runs the command line: exit status 2 and one line on standard error for whatever a user can mend."""
    logging.basicConfig(level=logging.WARNING, format="miwv-fast: %(message)s")
    # Other libraries' own bars and advice would drown ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for noisy in ("transformers", "sentence_transformers", "huggingface_hub", "httpx", "gguf"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        app()
    except Interrupted as stop:
        typer.echo(f"miwv-fast: {stop}; this goes on: {_resume_command()}", err=True)
        sys.exit(130)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if os.environ.get("MIWV_TRACEBACK"):
            raise
        typer.echo(f"miwv-fast: error: {error}", err=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            typer.echo(f"miwv-fast: with more room this goes on: {_resume_command()}", err=True)
        sys.exit(2)


def _resume_command() -> str:
    """The command of this process without --fresh, which would move aside what is to go on."""
    return shlex.join(["miwv-fast", *(argument for argument in sys.argv[1:] if argument != "--fresh")])


def _read_embeddings(path: str) -> Any:
    import numpy as np

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such embedding file: {path}")
    return np.load(path, allow_pickle=False)
