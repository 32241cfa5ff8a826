"""The whole job: data, neighbours, plan, model and kernels become scores."""

from __future__ import annotations

import itertools
import logging
import operator
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import torch

from miwv_fast.chat import CHAT_DATE
from miwv_fast.devices import choose_device, choose_dtype
from miwv_fast.embedding import (
    DEFAULT_EMBEDDER,
    Embedder,
    Kept,
    check_embedder,
    check_embeddings,
    describe_embedder,
    identify_embedder,
    open_embedder,
)
from miwv_fast.engine import Engine, LocalEngine, ModelFacts
from miwv_fast.errors import Interrupted
from miwv_fast.extras import import_extra
from miwv_fast.files import Location
from miwv_fast.job import Job
from miwv_fast.neighbors import Neighbors
from miwv_fast.progress import Progress
from miwv_fast.records import Records, read_records
from miwv_fast.saved import read_embeddings
from miwv_fast.scores import Scores
from miwv_fast.sources import Source, open_source
from miwv_fast.stopping import finishing, stoppable
from miwv_fast.store import Run, check_output
from miwv_fast.templates import check_template, load_template

_SHOWN_REJECTIONS = 5

_log = logging.getLogger(__name__)


@stoppable
def score(
    data: object,
    model: str | Path | tuple[Any, Any],
    *,
    tokenizer: Any = None,
    embedder: Embedder = DEFAULT_EMBEDDER,
    template: str | Path = "alpaca",
    neighbors: int = 1,
    include_eos: bool = False,
    max_length: int | None = None,
    batch_tokens: int | Literal["auto"] = "auto",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    share_prefix: bool = True,
    output: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool | Literal["auto"] = "auto",
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
) -> Scores:
    """Scores every record by its Model Instruction Weakness Value: one-shot minus zero-shot mean response loss.

    Args:
        data: Path(s) of JSON, JSONL, CSV or Parquet (also .gz, .xz, .zst), a Hugging Face data set or its name (of
            several splits `train` is read), a table of pandas, Arrow or polars, or an iterable of dicts. Records are
            Alpaca (`instruction`, `input`, `output`, or Dolly's `context` and `response`), pairs (`prompt` with
            `completion` or `response`, `question` or `query` with `answer` or `response`, `problem` with `solution` or
            `generated_solution`, `inputs` with `targets`, `input` with `output`), OpenAI `messages`, or ShareGPT
            `conversations` (or `conversation`, or texts in `data`); with any of them the text of `system` or
            `system_prompt` counts, with the first two the earlier turns in `history`.
        model: Hub name, folder, GGUF file, or a loaded `(model, tokenizer)` pair, which is used as it is: put into
            evaluation mode, and moved or converted where `device` or `dtype` say so. Its tokenizer may be a name.
        tokenizer: A tokenizer, or its name or folder, where it is not the model's own.
        embedder: A sentence-transformers name, folder or loaded model, an array [N, D] with a row per input record, a
            .npy file of one, or a callable from lists of at most 8,192 texts to such arrays.
        template: `alpaca`, `plain`, `chat`, or a Jinja file that defines `prompt(instruction, input)` and `separator`.
        neighbors: How many demonstrations a record is scored with, one at a time; the score is the mean. If there are
            fewer other records, all of them.
        include_eos: Whether the end of turn is scored too, directly after each response: EOS, with `chat` the control
            token that the template writes behind the last response of a conversation.
        max_length: Tokens per sequence; by default what the model knows.
        batch_tokens: Padded tokens per forward pass. `auto`: 1,024 on a CPU, what the weights leave room for on a GPU;
            halved when memory runs out.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: The model's type: `auto` (float32 on a CPU, the checkpoint's on a GPU), `float32`, `bfloat16`, `float16`.
        share_prefix: Whether to run what passes begin with in common, demonstrations above all, once, and the rest
            on the kept keys and values: the same scores to rounding for two thirds of the tokens or fewer. Where
            the model does not allow it, it is not done; where a chat template rewrites earlier turns, less is saved.
        output: A folder for the run, or the URL of one in a store that fsspec knows (s3://, gs://): `scores.parquet`,
            `manifest.json`, `rejected.jsonl`, and what it takes to go on after an interruption. Without it nothing is
            written.
        resume: Whether to continue the run that `output` holds; it must be the same in everything that can change a
            score. Otherwise the old run is moved aside and a new one begins.
        progress: Whether to show progress bars; `auto` shows them on a terminal.
        engine: `local` runs the model in this process; `ray` runs it on many GPUs and machines, with the same scores.
        ray_address: A running Ray cluster, `auto` or `HOST:PORT`; by default one of this machine alone is started. A
            session that this process has already is used and left alive.
        workers: How many copies of the model run; by default as many as the GPUs of the cluster allow, without GPUs one
            per machine.
        gpus_per_worker: GPUs of each worker, by default 1 where there are any. With more than 1 the model is spread
            over them.

    Returns:
        The scores, a row per input record. Losses are in nats per token, higher MIWV is better.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came while `output` was written; calling again goes on.
        ValueError, TypeError, FileNotFoundError: For input that cannot be used, saying what and where. A single bad
            record is none of these: it has a status instead of a score.

    Source: Jiang et al., AAAI 2026, arXiv 2511.07074.
    """
    # What can be checked without the model is checked before it is loaded.
    for name, value in (("include_eos", include_eos), ("share_prefix", share_prefix), ("resume", resume)):
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} should be True or False, it is {value!r}")
    neighbors = _whole("neighbors", neighbors, 1)
    max_length = None if max_length is None else _whole("max_length", max_length, 2)
    budget = None if batch_tokens == "auto" else _whole("batch_tokens", batch_tokens, 1)
    workers = None if workers is None else _whole("workers", workers, 1)
    _check_engine(engine, model, device, ray_address, workers, gpus_per_worker)
    bars = Progress(progress)
    if output is not None:
        if not isinstance(output, str | os.PathLike):
            raise TypeError(f"output should be a folder or a URL, it is {output!r}")
        if not os.fspath(output):
            raise ValueError("output is the empty text; give a folder or a URL")
        check_output(output)
    check_template(template)
    choose_dtype(dtype, choose_device(device) if engine == "local" else "cpu")
    embedder = open_embedder(embedder)
    source = open_source(data)
    if output is None or not (Location(output) / "neighbors.parquet").exists():
        check_embedder(embedder)
    records = read_records(source)
    if isinstance(embedder, np.ndarray | torch.Tensor):
        embedder = check_embeddings(embedder, len(records))
    if isinstance(model, tuple) or engine == "local":
        opened: Engine = LocalEngine(model, tokenizer, device, dtype, budget)
    else:
        from miwv_fast.ray_engine import RayEngine

        opened = RayEngine(
            model,
            tokenizer,
            device,
            dtype,
            budget,
            address=ray_address,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
        )
    with closing(opened):
        return _score_on(
            opened,
            source,
            records,
            embedder=embedder,
            template=template,
            neighbors=neighbors,
            include_eos=include_eos,
            max_length=max_length,
            share_prefix=share_prefix,
            output=output,
            resume=resume,
            bars=bars,
        )


def _score_on(
    engine: Engine,
    source: Source,
    records: Records,
    *,
    embedder: Embedder,
    template: str | Path,
    neighbors: int,
    include_eos: bool,
    max_length: int | None,
    share_prefix: bool,
    output: str | os.PathLike[str] | None,
    resume: bool,
    bars: Progress,
) -> Scores:
    facts = engine.facts
    loaded = load_template(template, engine.tokenizer, include_eos)
    limit = _choose_limit(max_length, facts)
    manifest = {
        "data": source.describe(),
        "records": len(records),
        "texts": records.texts,
        "model": {"name": facts.name, "sha256": None if output is None else engine.fingerprint()},
        "tokenizer": loaded.encoder.fingerprint(),
        "embedder": describe_embedder(embedder),
        "embedder_content": None if output is None else identify_embedder(embedder),
        "template": {"name": loaded.name, "source": loaded.source, "chat_date": CHAT_DATE.date().isoformat()},
        "neighbors": neighbors,
        "include_eos": include_eos,
        "max_length": limit,
        "batch_tokens": facts.batch_tokens,
        "cache_tokens": facts.cache_tokens,
        "share_prefix": share_prefix,
        "device": torch.device(facts.device).type,
        "dtype": facts.dtype,
        "versions": facts.versions,
        "kernels": facts.kernels,
    }
    job = Job.start(records, loaded, limit, neighbors)
    # Nothing is written for data that cannot be scored.
    job.measure_zero_shot(bars)
    job.require_two(source)
    job.require_known(facts.vocab_size)
    if output is None:
        embeddings = _score(job, source, embedder, engine, share_prefix, bars, None)
        return Scores(job.table(), manifest, source, job.stats, embeddings)
    with Run(output, manifest, resume=resume) as run:
        _score(job, source, embedder, engine, share_prefix, bars, run)
        scores = Scores(job.table(), run.manifest, source, job.stats, read_embeddings(run.folder))
        run.save_rejections(job.rejections)
        run.finish(scores)
    return scores


def _score(
    job: Job, source: Source, embedder: Embedder, engine: Engine, share_prefix: bool, bars: Progress, run: Run | None
) -> np.ndarray | None:
    """All stages of a job behind its tokens; with `run`, what is on disk is not done again and what is done goes there.

    Returns the embeddings float32 [N, D] where they do not lie in the run.
    """
    if run is not None:
        run.save_source(source)
        run.save_rejections(job.rejections)
    for rejection in itertools.islice(job.rejections, _SHOWN_REJECTIONS):
        _log.warning("%s: %s", rejection.location, rejection.reason)
    if len(job.rejections) > _SHOWN_REJECTIONS:
        _log.warning("... and %d more malformed records", len(job.rejections) - _SHOWN_REJECTIONS)
    job.neighbors, embeddings = _find_neighbors(job, embedder, engine, bars, run)
    if job.neighbors.recall is not None:
        job.stats["neighbor_recall"] = job.neighbors.recall
    shared_length = engine.facts.shared_length if share_prefix else 0
    job.measure_one_shot(bars, shared_length)
    if run is None:
        job.run(engine, bars, shared_length)
    else:
        with finishing() as stopping:
            job.run(engine, bars, shared_length, run, stopping)
    return embeddings


def _find_neighbors(
    job: Job, embedder: Embedder, engine: Engine, bars: Progress, run: Run | None
) -> tuple[Neighbors, np.ndarray | None]:
    """The neighbours, and the embeddings float32 [N, D] that they were found by where these do not lie in the run."""
    if run is not None and (kept := run.neighbors(len(job.records), job.k)) is not None:
        return kept, None
    scorable = job.pending()
    texts = job.records.embedded_texts(scorable)
    if run is None or isinstance(embedder, np.ndarray | torch.Tensor):
        embeddings = engine.embed(texts, embedder, bars)
    else:
        with finishing() as stopping:
            embeddings = engine.embed(texts, Kept(embedder, run.read_call, _keeper(run, stopping)), bars)
    found = engine.nearest(embeddings, scorable, job.k, bars)
    if run is None:
        return found, embeddings
    run.save_neighbors(embeddings, found)
    return found, None


def _keeper(run: Run, stopping: Callable[[], bool]) -> Callable[[int, np.ndarray], None]:
    """Keeps a call of the embedder, and stops behind it where a signal has come."""

    def keep(number: int, rows: np.ndarray) -> None:
        run.keep_call(number, rows)
        if stopping():
            raise Interrupted("stopped while embedding; what was embedded is kept")

    return keep


def _whole(name: str, value: SupportsIndex, least: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} should be a whole number, it is {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} should be at least {least}, it is {number}")
    return number


def _check_engine(
    engine: str,
    model: object,
    device: str,
    address: str | None,
    workers: int | None,
    gpus_per_worker: float | None,
) -> None:
    if engine not in ("local", "ray"):
        raise ValueError(f"engine should be 'local' or 'ray', it is {engine!r}")
    given = {"ray_address": address, "workers": workers, "gpus_per_worker": gpus_per_worker}
    if engine == "local":
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is for engine='ray', the engine is 'local'")
        return
    import_extra("ray.data", "ray")
    if not isinstance(model, str | Path):
        raise TypeError("engine='ray' loads the model on every worker: give its name or folder, not a loaded pair")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"engine='ray' gives each worker its own GPUs: use auto, cpu or cuda, not {device}")
    if gpus_per_worker is not None and not (
        gpus_per_worker >= 0 and (gpus_per_worker < 1 or float(gpus_per_worker).is_integer())
    ):
        raise ValueError(f"gpus_per_worker should be a whole number or a share below 1, it is {gpus_per_worker}")


def _choose_limit(max_length: int | None, facts: ModelFacts) -> int | None:
    if max_length is not None and facts.max_length is not None and max_length > facts.max_length:
        raise ValueError(f"max_length {max_length} is more than the {facts.max_length} positions that the model knows")
    return max_length if max_length is not None else facts.max_length
