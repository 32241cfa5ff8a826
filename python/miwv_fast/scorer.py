"""The whole job: data, neighbours, plan, model and kernels become scores."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from miwv_fast.forest import plan_batches
from miwv_fast.info import package_versions
from miwv_fast.model import CausalLM, choose_device, choose_dtype, load_model
from miwv_fast.neighbors import DEFAULT_EMBEDDER, Embedder, Neighbors, embed, nearest
from miwv_fast.progress import Progress
from miwv_fast.records import Record, Records, Rejection, read_records
from miwv_fast.scores import SCHEMA, Scores, write_run
from miwv_fast.sources import Source, open_source
from miwv_fast.templates import CHAT_DATE, Template, TokenSequence, load_template, read_template

_SHOWN_REJECTIONS = 5

_log = logging.getLogger(__name__)


def score(
    data: object,
    model: str | Path | tuple[Any, Any],
    *,
    tokenizer: Any = None,
    embedder: Embedder = DEFAULT_EMBEDDER,
    template: str | Path = "alpaca",
    include_eos: bool = False,
    max_length: int | None = None,
    batch_tokens: int | Literal["auto"] = "auto",
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    output: str | os.PathLike[str] | None = None,
    progress: bool | Literal["auto"] = "auto",
) -> Scores:
    """Scores every record by its Model Instruction Weakness Value: one-shot minus zero-shot mean response loss.

    Args:
        data: Path(s) of JSON, JSONL, CSV or Parquet (also .gz, .xz, .zst), a Hugging Face data set or its name, or
            an iterable of dicts. Records are Alpaca (`instruction`, `input`, `output`), `prompt` with `completion`
            or `response`, OpenAI `messages`, or ShareGPT `conversations`.
        model: Hub name, folder, GGUF file, or a loaded `(model, tokenizer)` pair.
        tokenizer: A tokenizer, or its name or folder, where it is not the model's own.
        embedder: A sentence-transformers name or folder, an array [N, D] with a row per input record, or a callable
            from a list of texts to such an array.
        template: `alpaca`, `plain`, `chat`, or a Jinja file that defines `prompt(instruction, input)` and `separator`.
        include_eos: Whether the end-of-turn token behind each response is scored too.
        max_length: Tokens per sequence; by default what the model knows.
        batch_tokens: Padded tokens per forward pass.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: The model's type: `auto` (float32 on a CPU, the checkpoint's on a GPU), `float32`, `bfloat16`, `float16`.
        output: A folder for `scores.parquet`, `manifest.json` and `rejected.jsonl`; without it nothing is written.
        progress: Whether to show progress bars; `auto` shows them on a terminal.

    Returns:
        The scores, a row per input record. Losses are in nats per token, higher MIWV is better.

    Raises:
        ValueError, TypeError, FileNotFoundError: For input that cannot be used, saying what and where. A single bad
            record is none of these: it has a status instead of a score.

    Source: Jiang et al., AAAI 2026, arXiv 2511.07074.
    """
    # What can be checked without the model is checked before it is loaded.
    _check_arguments(max_length, batch_tokens)
    folder = _check_output(output)
    bars = Progress(progress)
    read_template(template)
    choose_dtype(dtype, choose_device(device))
    source = open_source(data)
    records = read_records(source)
    lm = load_model(model, tokenizer, device, dtype)
    layout = load_template(template, lm.tokenizer, include_eos)
    limit = _choose_limit(max_length, lm)
    tokens = _default_batch_tokens(lm) if batch_tokens == "auto" else batch_tokens

    job = _Job.start(records, layout, limit)
    job.measure_zero_shot(bars)
    job.require_two(source)
    scorable = job.pending()
    texts = [records[i].embedded_text if scorable[i] else "" for i in range(len(records))]
    embeddings = embed(texts, scorable, embedder, str(lm.device), bars)
    job.neighbors = nearest(embeddings, scorable, str(lm.device), bars)
    job.measure_one_shot(bars)
    job.run(lm, tokens, bars)
    for rejection in job.rejections[:_SHOWN_REJECTIONS]:
        _log.warning("%s: %s", rejection.location, rejection.reason)
    if len(job.rejections) > _SHOWN_REJECTIONS:
        _log.warning("... and %d more malformed records", len(job.rejections) - _SHOWN_REJECTIONS)

    manifest = {
        "data": source.describe(),
        "records": len(records),
        "model": lm.name,
        "tokenizer": getattr(lm.tokenizer, "name_or_path", ""),
        "embedder": str(embedder) if isinstance(embedder, str | Path) else type(embedder).__name__,
        "template": layout.name,
        "template_source": layout.source,
        "chat_date": CHAT_DATE.date().isoformat(),
        "include_eos": include_eos,
        "max_length": limit,
        "batch_tokens": tokens,
        "device": str(lm.device),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "versions": package_versions(),
    }
    scores = Scores(job.table(), manifest, source, job.stats)
    if folder is not None:
        write_run(folder, scores, job.rejections)
    return scores


@dataclass
class _Job:
    """What is known of each record so far; arrays have one entry per input record."""

    records: Records
    template: Template
    max_length: int | None
    status: list[str | None]
    rejections: list[Rejection]
    scored_tokens: np.ndarray  # int32 [N], equal in both passes
    zero_length: np.ndarray  # int32 [N], positions of the zero-shot pass once it is cut
    one_length: np.ndarray
    nll_zero: np.ndarray  # float32 [N]
    nll_one: np.ndarray
    neighbors: Neighbors
    stats: dict[str, float] = field(default_factory=dict)

    @classmethod
    def start(cls, records: Records, template: Template, max_length: int | None) -> _Job:
        n = len(records)
        nothing = Neighbors(np.full(n, -1, np.int64), np.full(n, np.nan, np.float32))
        counts = [np.zeros(n, np.int32) for _ in range(3)]
        losses = [np.full(n, np.nan, np.float32) for _ in range(2)]
        return cls(
            records, template, max_length, list(records.status), list(records.rejections), *counts, *losses, nothing
        )

    def pending(self) -> np.ndarray:
        """bool [N]: the records that nothing speaks against so far."""
        return np.array([status in (None, "truncated") for status in self.status])

    def require_two(self, source: Source) -> None:
        if self.pending().sum() >= 2:
            return
        counts = ", ".join(f"{count} {status or 'scorable'}" for status, count in Counter(self.status).items())
        reason = f"; {self.rejections[0].location}: {self.rejections[0].reason}" if self.rejections else ""
        raise ValueError(
            f"{source.name}: at least two records that can be scored are needed, since each is the other's "
            f"demonstration; found {counts}{reason}"
        )

    def measure_zero_shot(self, bars: Progress) -> None:
        """Tokenizes every record once: what is too long or has no response token falls out here."""

        def measure(i: int, record: Record) -> None:
            sequence = self.template.zero_shot(record)
            room = sequence.room(self.max_length)
            if not len(sequence.targets):
                self.status[i] = "empty_response"
            elif not room:
                self.status[i] = "too_long"
            self.scored_tokens[i] = room

        self._each("tokens", measure, bars)

    def measure_one_shot(self, bars: Progress) -> None:
        """Lengths of both passes; the demonstration may cost a response its tail or all of its room."""

        def measure(i: int, record: Record) -> None:
            if self.neighbors.index[i] < 0:
                self.status[i] = "no_neighbor"
                return
            zero = self.template.zero_shot(record)
            one = self.template.one_shot(self.records[int(self.neighbors.index[i])], record)
            room = min(one.room(self.max_length), zero.room(self.max_length))
            self.scored_tokens[i] = room
            if not room:
                self.status[i] = "demonstration_too_long"
                return
            if room < len(zero.targets):
                self.status[i] = "truncated"
            self.zero_length[i] = len(zero.cut(room).ids)
            self.one_length[i] = len(one.cut(room).ids)

        self._each("plan", measure, bars)

    def run(self, lm: CausalLM, batch_tokens: int, bars: Progress) -> None:
        """Both passes of every record that is left, in batches of like length."""
        left = np.flatnonzero(self.pending())
        record = np.concatenate([left, left])
        one_shot = np.arange(len(record)) >= len(left)
        lengths = np.where(one_shot, self.one_length[record], self.zero_length[record])
        padded = 0
        begin = time.perf_counter()
        with bars.task("scoring", int(lengths.sum()), "tokens") as advance:
            for batch in plan_batches(lengths, batch_tokens):
                sequences = [self._sequence(int(record[place]), bool(one_shot[place])) for place in batch]
                nll = lm.response_nll(sequences)
                for place, value in zip(batch, nll, strict=True):
                    (self.nll_one if one_shot[place] else self.nll_zero)[record[place]] = value
                padded += len(batch) * int(lengths[batch].max())
                advance(int(lengths[batch].sum()))
        forwarded = int(lengths.sum())
        self.stats = {
            "forwarded_tokens": forwarded,
            "padding_tokens": padded - forwarded,
            "scoring_seconds": time.perf_counter() - begin,
        }
        for i in left:
            if not np.isfinite(self.nll_one[i] - self.nll_zero[i]):
                self.status[i] = "non_finite"

    def table(self) -> pa.Table:
        n = len(self.records)
        status = ["ok" if status is None else status for status in self.status]
        unscored = np.array([name not in ("ok", "truncated") for name in status])
        no_tokens = np.array([name not in ("ok", "truncated", "non_finite") for name in status])
        no_neighbor = self.neighbors.index < 0
        columns = [
            pa.array(np.arange(n)),
            self.records.ids(),
            pa.array(self.nll_one - self.nll_zero, mask=unscored),
            pa.array(self.nll_one, mask=unscored),
            pa.array(self.nll_zero, mask=unscored),
            pa.array(self.scored_tokens, mask=no_tokens),
            pa.array(self.neighbors.index, mask=no_neighbor),
            pa.array(self.neighbors.similarity, mask=no_neighbor),
            pa.array(status),
        ]
        return pa.table(columns, schema=SCHEMA)

    def _sequence(self, i: int, one_shot: bool) -> TokenSequence:
        record = self.records[i]
        if one_shot:
            sequence = self.template.one_shot(self.records[int(self.neighbors.index[i])], record)
        else:
            sequence = self.template.zero_shot(record)
        return sequence.cut(int(self.scored_tokens[i]))

    def _each(self, name: str, measure: Callable[[int, Record], None], bars: Progress) -> None:
        left = np.flatnonzero(self.pending())
        with bars.task(name, len(left), "records") as advance:
            for i in left.tolist():
                record = self.records[i]
                try:
                    measure(i, record)
                except ValueError as error:
                    self.status[i] = "malformed"
                    self.rejections.append(Rejection(i, f"record {i}", str(error), record.embedded_text))
                advance(1)


def _check_arguments(max_length: int | None, batch_tokens: int | Literal["auto"]) -> None:
    for name, value, least in (("max_length", max_length, 2), ("batch_tokens", batch_tokens, 1)):
        if value is None or value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} should be a whole number, it is {value!r}")
        if value < least:
            raise ValueError(f"{name} should be at least {least}, it is {value}")


def _check_output(output: str | os.PathLike[str] | None) -> Path | None:
    if output is None:
        return None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; give a folder for the run")
    if (folder / "scores.parquet").exists():
        raise ValueError(f"output {folder} holds a finished run already; give another folder, or remove it first")
    return folder


def _choose_limit(max_length: int | None, lm: CausalLM) -> int | None:
    if max_length is not None and lm.max_length is not None and max_length > lm.max_length:
        raise ValueError(f"max_length {max_length} is more than the {lm.max_length} positions that the model knows")
    return max_length if max_length is not None else lm.max_length


def _default_batch_tokens(lm: CausalLM) -> int:
    return 1024 if lm.device.type == "cpu" else 16384
