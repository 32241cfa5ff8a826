"""Which response tokens a record's score comes from: the loss of each, with the demonstration and without."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from miwv_fast.terminal import printable

if TYPE_CHECKING:
    from miwv_fast.assembly import TokenSequence
    from miwv_fast.model import CausalLM
    from miwv_fast.templates import Template

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explanation:
    """The scored response tokens of a record, in order.

    `tokens` are their texts, which together are the response (the assistant turns one after the other); a character
    that several tokens make up stands with the last of them. `one_shot` and `zero_shot`, float32 [T], are negative
    log-likelihoods in nats, and `difference` is the first minus the second: its mean is the record's MIWV.
    """

    tokens: list[str]
    one_shot: np.ndarray
    zero_shot: np.ndarray
    difference: np.ndarray


def explain(
    record: Mapping[str, Any],
    neighbor: Mapping[str, Any],
    model: str | Path | tuple[Any, Any] | CausalLM,
    *,
    tokenizer: Any = None,
    template: str | Path | Template = "alpaca",
    include_eos: bool = False,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
) -> Explanation:
    """The loss of each response token of `record`, with `neighbor` as its demonstration and without.

    Both are records of any of the four shapes that `score` reads; the other arguments are those of `score`. A loaded
    `CausalLM` and a loaded template (with its own `include_eos`) are used as they are, so that neither need be loaded
    for each record. Raises ValueError if one of the records cannot be read, or no response token is left within
    `max_length`.

    Source: the terms of L(y | x) of Jiang et al., AAAI 2026, arXiv 2511.07074.
    """
    # Here, because `import miwv_fast` binds this function and should not cost what it needs.
    from miwv_fast.model import CausalLM, load_model
    from miwv_fast.templates import load_template

    lm = model if isinstance(model, CausalLM) else load_model(model, tokenizer, device, dtype)
    loaded = load_template(template, lm.tokenizer, include_eos) if isinstance(template, str | Path) else template
    return _explain(record, neighbor, lm, loaded, max_length)


def _explain(
    record: Mapping[str, Any],
    neighbor: Mapping[str, Any],
    lm: CausalLM,
    loaded: Template,
    max_length: int | None,
    most: int = sys.maxsize,
) -> Explanation:
    """As `explain`, of the first `most` tokens."""
    from miwv_fast.shapes import parse_record

    scored, demonstration = parse_record(record), parse_record(neighbor)
    passes = loaded.one_shot(demonstration, scored), loaded.zero_shot(scored)
    if max_length is not None and not 2 <= max_length <= (lm.max_length or sys.maxsize):
        raise ValueError(f"max_length should be 2 to {lm.max_length or 'any number'}, it is {max_length}")
    limit = lm.max_length if max_length is None else max_length
    room = min(most, *(sequence.room(limit) for sequence in passes))
    if not len(passes[1].rows):
        raise ValueError("the record's response is empty: there is no token to explain")
    if not room:
        longest = max(len(sequence.ids) for sequence in passes)
        raise ValueError(f"no response token stands within {limit} positions: the sequences have up to {longest}")
    one_shot, zero_shot = (lm.token_nll(sequence.cut(room)).cpu().numpy() for sequence in passes)
    return Explanation(_texts(passes[1].cut(room), loaded.encoder.decode), one_shot, zero_shot, one_shot - zero_shot)


def _texts(sequence: TokenSequence, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each scored token; each turn is decoded behind the token that stands before it."""
    texts: list[str] = []
    turns = np.flatnonzero(np.diff(sequence.rows) != 1) + 1
    for rows, targets in zip(np.split(sequence.rows, turns), np.split(sequence.targets, turns), strict=True):
        texts += _added_texts([int(sequence.ids[rows[0]])], targets.tolist(), decode)
    return texts


def _added_texts(before: list[int], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text; nothing while a character is incomplete, which decodes to U+FFFD."""
    texts: list[str] = []
    pending: list[int] = []
    for place, token in enumerate(tokens):
        pending.append(token)
        text = decode(before + pending)
        if text.endswith("\ufffd") and place + 1 < len(tokens):
            texts.append("")
            continue
        texts.append(text[len(decode(before)) :])
        before, pending = pending, []
    return texts


class Explainer:
    """Explains the records of one run with the run's own settings.

    `model` is a name, folder or loaded pair, by default what scored the run. Raises ValueError where the scores have no
    manifest, or the tokenizer is another than the run's.
    """

    def __init__(
        self, settings: Mapping[str, Any], model: Any = None, tokenizer: Any = None, device: str = "auto"
    ) -> None:
        from miwv_fast.devices import DTYPES
        from miwv_fast.info import package_versions
        from miwv_fast.model import load_model
        from miwv_fast.templates import load_template

        if "template" not in settings:
            raise ValueError("these scores have no manifest, so how to explain them is not known")
        dtype = "auto" if isinstance(model, tuple) or settings["dtype"] not in DTYPES else settings["dtype"]
        self._lm = load_model(model or settings["model"]["name"], tokenizer, device, dtype)
        name, source = settings["template"]["name"], settings["template"]["source"]
        self._template = load_template(name, self._lm.tokenizer, settings["include_eos"], source)
        self._max_length = settings["max_length"]
        self._tolerance = 1e-3 if self._lm.model.dtype == torch.float32 and settings["dtype"] == "float32" else 0.1
        if self._template.encoder.fingerprint() != settings["tokenizer"]:
            message = f"the tokenizer of {self._lm.name} is not the one that the run was scored with"
            versions = package_versions(("transformers", "tokenizers"))
            if any(settings["versions"].get(name) != version for name, version in versions.items()):
                _log.warning("%s, or looks otherwise in this version of transformers", message)
            else:
                raise ValueError(f"{message}; give that by tokenizer")

    def __call__(self, record: Mapping[str, Any], neighbor: Mapping[str, Any], row: Mapping[str, Any]) -> Explanation:
        """As `explain`, of the tokens that were scored; `row` is the record's in the table.

        Warns, once, where the zero-shot loss is not the one that the run has.
        """
        # Another of several demonstrations may have left room for fewer tokens than this one does.
        told = _explain(record, neighbor, self._lm, self._template, self._max_length, row["response_tokens"])
        zero_shot = row["nll_zero_shot"]
        if abs(told.zero_shot.mean() - zero_shot) > self._tolerance:
            _log.warning(
                "is %s the model that scored the run? A zero-shot loss is %.4f, in the run it is %.4f",
                self._lm.name,
                told.zero_shot.mean(),
                zero_shot,
            )
            self._tolerance = math.inf
        return told


def explain_run(
    run: str | Path,
    index: int,
    model: str | None = None,
    data: object = None,
    tokenizer: str | None = None,
    device: str = "auto",
) -> tuple[str, Explanation]:
    """Explains a record of a run by its nearest demonstration, with the run's own settings; and a line about it.

    Without `model` the one that scored the run is loaded. Raises ValueError for a record without a score, or where the
    tokenizer is not the run's.
    """
    from miwv_fast.saved import load_scores

    scores = load_scores(run, data)
    if not 0 <= index < len(scores):
        raise ValueError(f"there is no record {index}: the scores are of records 0 to {len(scores) - 1}")
    row = scores.table.slice(index, 1).to_pylist()[0]
    if row["miwv"] is None:
        raise ValueError(f"record {index} has no score: {row['status']}")
    record, neighbor = scores.rows([index, row["neighbor"]])
    told = Explainer(scores.manifest, model, tokenizer, device)(record, neighbor, row)
    means = f"one-shot {told.one_shot.mean():.4f}, zero-shot {told.zero_shot.mean():.4f} nats per token"
    name, used = "MIWV", len(row.get("neighbors", ()))
    if used > 1:
        name = f"the nearest of {used}, whose mean MIWV is {row['miwv']:+.4f}: difference"
    return f"record {index}, demonstration {row['neighbor']}: {name} {told.difference.mean():+.4f}, {means}", told


def show(line: str, explanation: Explanation) -> None:
    """Prints the response coloured by the difference of each token on a terminal, a line per token elsewhere."""
    from rich.console import Console
    from rich.text import Text

    print(line)
    console = Console()
    if not console.is_terminal or console.no_color or console.color_system is None:
        print("difference  one-shot  zero-shot  token")
        for token, one, zero, difference in zip(
            explanation.tokens, explanation.one_shot, explanation.zero_shot, explanation.difference, strict=True
        ):
            print(f"{difference:+10.4f}  {one:8.4f}  {zero:9.4f}  {token!r}")
        return
    strongest = max(float(np.abs(explanation.difference).max()), 1e-6)
    text = Text()
    for token, difference in zip(explanation.tokens, explanation.difference.tolist(), strict=True):
        faded = round(255 * (1 - abs(difference) / strongest))
        background = f"rgb(255,{faded},{faded})" if difference > 0 else f"rgb({faded},{faded},255)"
        shown = printable(token, keep="\n\t")
        text.append(shown, style=f"black on {background}")
    print(f"red: the demonstration hurts, blue: it helps, by up to {strongest:.2f} nats")
    console.print(text)
