"""The command line."""

from __future__ import annotations

import errno
import functools
import io
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tqdm
import typer

from miwv_fast.errors import Interrupted
from miwv_fast.terminal import Messages, printable

if TYPE_CHECKING:
    from miwv_fast.ranker import Duplicates

_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Data = Annotated[list[str] | None, typer.Option(help="The scored data, if it has moved; once for each file.")]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import miwv_fast

        typer.echo(f"miwv-fast {miwv_fast.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Score, rank and select instruction data by Model Instruction Weakness Value (MIWV)."""


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for scores.parquet and selected.jsonl.")
    ] = Path("miwv-demo"),
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
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Run folder or URL to write: scores.parquet, manifest.json, rejected.jsonl."
        ),
    ],
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, where it is not the model's own.")] = None,
    embedder: Annotated[
        str, typer.Option(help="sentence-transformers name or folder, or a .npy file with one row per record.")
    ] = "sentence-transformers/all-MiniLM-L6-v2",
    template: Annotated[str, typer.Option(help="alpaca, plain, chat, or a Jinja file.")] = "alpaca",
    neighbors: Annotated[int, typer.Option(help="Demonstrations per record, one at a time; scores are averaged.")] = 1,
    include_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = False,
    max_length: Annotated[int | None, typer.Option(help="Tokens per sequence; default: the model's.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Padded tokens per forward pass; default: automatic.")
    ] = None,
    device: _Device = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="auto (float32 on a CPU, the checkpoint's on a GPU), float32, bfloat16 or float16."),
    ] = "auto",
    share_prefix: Annotated[bool, typer.Option(help="Run what sequences have in common only once.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Move a run that OUTPUT holds aside and start over.")] = False,
    progress: Annotated[bool | None, typer.Option(help="Progress bars; default: on a terminal.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: many GPUs and machines.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster, auto or HOST:PORT; default: this machine alone.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Copies of the model under Ray; default: as GPUs allow, without any one per machine."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="GPUs of each copy, whole or a share below 1; default: 1, if any.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what Ray says, and more of our own.")] = False,
) -> None:
    """Scores every record of DATA and writes the scores to a run folder; the same command goes on after a stop.

    Example: miwv-fast score alpaca.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct --output run
    """
    import miwv_fast

    if verbose:
        logging.getLogger("miwv_fast").setLevel(logging.INFO)
    scores = miwv_fast.score(
        data[0] if len(data) == 1 else data,
        model,
        tokenizer=tokenizer,
        embedder=embedder,
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
        engine=engine,  # type: ignore[arg-type]
        ray_address=ray_address,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
    )
    counts = ", ".join(f"{count} {status}" for status, count in scores.counts().items())
    typer.echo(f"{len(scores)} records: {counts}")
    resumed, seconds = scores.stats["resumed_tokens"], scores.stats["scoring_seconds"]
    tokens = scores.stats["forwarded_tokens"] - resumed
    if tokens:
        typer.echo(f"forwarded {tokens} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s")
    if resumed:
        typer.echo(f"{resumed} tokens were forwarded before this call")
    written, run = f"{output.rstrip('/')}/scores.parquet", shlex.quote(output)
    if scores.table["miwv"].null_count == len(scores):
        typer.echo(f"wrote {written}, in which no record has a score")
        return
    typer.echo(f"wrote {written}; next: miwv-fast select {run} --top 1% --output subset.jsonl")
    typer.echo(f"or look at it first: miwv-fast report {run}")


@app.command()
def select(
    run: Annotated[str, typer.Argument(help="A run folder, or a scores file.")],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="What to write, best record first: .jsonl, .parquet, or a folder for datasets."
        ),
    ],
    top: Annotated[
        str | None, typer.Option(help="A share such as 1% or 0.01, or a number of records.", show_default="1%")
    ] = None,
    min_miwv: Annotated[
        float | None, typer.Option(help="Only records with this MIWV or more; without --top all of them.")
    ] = None,
    min_response_tokens: Annotated[
        int | None, typer.Option(help="Only records of which this many response tokens or more were scored.")
    ] = None,
    dedup: Annotated[
        float | None,
        typer.Option(help="Leave out records whose cosine with a better one is this or more, such as 0.95."),
    ] = None,
    per: Annotated[
        str | None, typer.Option(help="A field of the data, each value of which gets its share of the selection.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="jsonl, parquet or datasets.", show_default="by OUTPUT's suffix")
    ] = None,
    trainer: Annotated[
        str | None, typer.Option(help="llama-factory or trl: write what it needs, and say how to call it.")
    ] = None,
    data: _Data = None,
) -> None:
    """Writes the best records of a run, unchanged, best first.

    Example: miwv-fast select run --top 5% --dedup 0.95 --per source --output subset.jsonl
    """
    from miwv_fast.export import check_not_lost, choose_format, write_records
    from miwv_fast.files import find_descriptor
    from miwv_fast.saved import load_scores
    from miwv_fast.trainers import check_trainer, write_for_trainer

    kind = choose_format(output, format)
    piped = find_descriptor(output) is not None  # what is told of the records must not stand among them
    if trainer is not None:
        check_trainer(trainer, kind)
        if piped:
            raise ValueError(f"{trainer} reads files: give one instead of {output}")
    scores = load_scores(run, data)
    check_not_lost(output, scores.source, run)
    chosen = scores.choose(
        "1%" if top is None and min_miwv is None else top,
        min_miwv=min_miwv,
        min_response_tokens=min_response_tokens,
        dedup=dedup,
        per=per,
    )
    rows = scores.rows(chosen.records)
    if dedup is not None:
        _show_duplicates(chosen.duplicates, piped)
    if trainer is None:
        write_records(output, rows, kind)
        command = None
    else:
        command = write_for_trainer(trainer, output, rows, kind, scores.manifest)
    typer.echo(f"wrote {len(rows)} of {len(scores)} records to {output}", err=piped)
    if command:
        typer.echo(f"next: {command}", err=piped)


def _show_duplicates(duplicates: Duplicates, piped: bool) -> None:
    typer.echo(f"left out {len(duplicates)} near-duplicates of better records", err=piped)
    shown = min(len(duplicates), 10)
    for place in range(shown):
        similarity = duplicates.similarity[place]
        line = f"  record {duplicates.records[place]}: like {duplicates.kept[place]}, cosine {similarity:.4f}"
        typer.echo(line, err=piped)
    if len(duplicates) > shown:
        typer.echo(f"  ... and {len(duplicates) - shown} more", err=piped)


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run folder, or a scores file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    top: Annotated[str, typer.Option(help="The selection that the report opens with: 1%, 0.01, or a number.")] = "1%",
    field: Annotated[str | None, typer.Option(help="Field of the data to compare by; default: looked for.")] = None,
    model: Annotated[str | None, typer.Option(help="Explains the extremes token by token with this model.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer that the run was scored with.", show_default="the model's own")
    ] = None,
    device: _Device = "auto",
    data: _Data = None,
) -> None:
    """Writes one HTML file that shows a run: open it in a browser, it needs no network."""
    from miwv_fast.export import check_not_lost
    from miwv_fast.files import find_descriptor
    from miwv_fast.saved import load_scores

    scores = load_scores(run, data)
    check_not_lost(output, scores.source, run)
    scores.report(output, top=top, field=field, model=model, tokenizer=tokenizer, device=device)
    piped = find_descriptor(output) is not None
    size = "" if piped else f", {output.stat().st_size / 1e6:.1f} MB"
    typer.echo(f"wrote {output}{size}", err=piped)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A run folder, or a scores file.")],
    b: Annotated[str, typer.Argument(help="Another run over the same data.")],
    data: _Data = None,
) -> None:
    """Prints how far two runs over the same data agree, and the records that moved most."""
    from miwv_fast.comparison import compare, show_comparison
    from miwv_fast.saved import load_scores

    first, second = load_scores(a, data), load_scores(b, data)
    show_comparison(compare(first, second), first)


@app.command()
def status(run: Annotated[str, typer.Argument(help="A run folder.")]) -> None:
    """Prints how far a run is, how fast, and what was rejected and why."""
    from miwv_fast.store import run_status

    told = run_status(run)
    of_units = "" if told["units"] is None else f" of {told['units']}"
    if told["finished"]:
        state = "finished"
    elif told["written_by"]:
        state = f"being written by {told['written_by']}"
    else:
        state = "stopped"
    typer.echo(f"{state}: {told['units_done']}{of_units} units, {told['tokens_done']} tokens")
    if told["tokens_per_second"]:
        left = "" if told["finished"] or told["seconds_left"] is None else f", {told['seconds_left']:.0f} s left"
        typer.echo(f"{told['tokens_per_second']:.0f} tokens/s{left}")
    if told["neighbor_recall"] is not None:
        typer.echo(f"neighbours by approximate search: {told['neighbor_recall']:.1%} of a sample's are the nearest")
    typer.echo(f"{sum(told['rejected'].values())} records rejected")
    for reason, count in list(told["rejected"].items())[:10]:
        typer.echo(f"  {count}: {printable(reason)}")


@app.command()
def explain(
    run: Annotated[str, typer.Argument(help="A run folder, or a scores file.")],
    index: Annotated[int, typer.Argument(help="The record's number, from 0.")],
    model: Annotated[str | None, typer.Option(help="The model.", show_default="the one that scored the run")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer that the run was scored with.", show_default="the model's own")
    ] = None,
    device: _Device = "auto",
    data: _Data = None,
) -> None:
    """Shows which response tokens a record's score comes from."""
    from miwv_fast.explain import explain_run, show

    show(*explain_run(run, index, model, data, tokenizer, device))


@app.command()
def bench() -> None:
    """Times the kernels on this machine beside torch and a plain read: at most two minutes, 1 GiB of memory."""
    from miwv_fast.bench import show_benchmark

    show_benchmark()


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="A model to load, to show how it would be scored.")] = None,
    device: _Device = "auto",
) -> None:
    """Prints what a bug report needs: versions, how the kernels were built, and what this machine offers."""
    import miwv_fast

    found = miwv_fast.info()
    if model is not None:
        from miwv_fast.model import load_model

        found["model"] = load_model(model, device=device).describe()
    typer.echo(json.dumps(found, indent=2))


def main() -> None:
    """Runs the command line: exit status 2 and one line on standard error for whatever a user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a finished command must not fail in what it says
    logging.basicConfig(level=logging.WARNING, format="miwv-fast: %(message)s", handlers=[Messages()])
    # Other libraries' own bars and advice would drown ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its variable TQDM_DISABLE is read on import, which torch has done by now.
    tqdm.std.tqdm.__init__ = functools.partialmethod(tqdm.std.tqdm.__init__, disable=True)
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
        reason = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
        typer.echo("miwv-fast: error: " + printable(reason, keep="\n\t"), err=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            typer.echo(f"miwv-fast: with more room this goes on: {_resume_command()}", err=True)
        sys.exit(2)


def _resume_command() -> str:
    """The command of this process without --fresh, which would move aside what is to go on."""
    return shlex.join(["miwv-fast", *(argument for argument in sys.argv[1:] if argument != "--fresh")])
