"""Segments to token sequences: where texts begin and end, what is tokenized jointly, which tokens are scored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from miwv_fast.ragged import Ragged
from miwv_fast.tokens import SegmentEncoder

_NO_PROMPT = "the template writes nothing before the response, so its first token has no prediction"


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one forward pass and the predictions in it that are scored.

    `ids` int32 [S]; the logits at position `rows[t]` predict `targets[t]`, both int32 [T], rows ascending.
    """

    ids: np.ndarray
    rows: np.ndarray
    targets: np.ndarray

    def room(self, max_length: int | None) -> int:
        """How many of the scored tokens stand within the first `max_length` positions."""
        return len(self.rows) if max_length is None else int(np.searchsorted(self.rows, max_length - 1))

    def cut(self, scored: int) -> TokenSequence:
        """The same sequence with its first `scored` targets only, ending with the last row that is read."""
        if not scored:
            raise ValueError("a sequence without a scored token cannot be run")
        return TokenSequence(self.ids[: self.rows[scored - 1] + 1], self.rows[:scored], self.targets[:scored])

    def prefix(self, scored: int) -> TokenSequence:
        """All tokens, as others continue them, with the first `scored` targets; none of them may be scored."""
        return TokenSequence(self.ids, self.rows[:scored], self.targets[:scored])

    def front(self, length: int) -> TokenSequence:
        """The first `length` tokens, none of which is read for a target."""
        return TokenSequence(self.ids[:length], self.rows[:0], self.targets[:0])

    def behind(self, length: int) -> TokenSequence:
        """What follows the first `length` tokens, none of which is read for a target."""
        return TokenSequence(self.ids[length:], self.rows - length, self.targets)


@dataclass(frozen=True)
class Slot:
    """Text from data inside a prompt, in place of a template's slot."""

    text: str


@dataclass(frozen=True)
class Prompt:
    """A stretch that is not a response: template text (str) and data (Slot), tokenized jointly."""

    parts: Sequence[str | Slot]


@dataclass(frozen=True)
class Response:
    """A response, tokenized by itself."""

    text: str
    scored: bool


@dataclass(frozen=True)
class Layout:
    """A sequence before it is tokenized: control tokens (int) and texts, each of which is tokenized by itself.

    `begins`: nothing stands before it. `first`: nothing but BOS stands before the first text. `scored`: the places of
    the scored responses in `pieces`.
    """

    pieces: list[int | str]
    begins: bool
    first: bool
    scored: list[int]


@dataclass(frozen=True)
class TokenTable:
    """Token sequences of N records: `ids`, and `spans` [M, 2], where their scored responses begin and end in them."""

    ids: Ragged
    spans: Ragged

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, begin: int, end: int) -> TokenTable:
        """Those from `begin` up to `end`."""
        return TokenTable(self.ids.part(begin, end), self.spans.part(begin, end))

    def sequence(self, row: int, end_of_turn: int | None) -> TokenSequence:
        """One of them; `end_of_turn` is scored behind each response unless it is None."""
        return score_spans(self.ids[row], self.spans[row], end_of_turn)


def score_spans(ids: np.ndarray, spans: np.ndarray, end_of_turn: int | None) -> TokenSequence:
    """A sequence whose responses, and the end of turn behind each of them, are scored: `spans` [M, 2] in `ids`."""
    more = [] if end_of_turn is None else [np.array([end_of_turn], np.int32)]
    rows, targets = [], []
    for start, stop in spans.tolist():
        rows.append(np.arange(start - 1, stop - 1 + len(more), dtype=np.int32))
        targets += [ids[start:stop], *more]
    if len(rows) == 1 and not more:
        return TokenSequence(ids, rows[0], targets[0])
    nothing = np.empty(0, np.int32)
    return TokenSequence(ids, np.concatenate([nothing, *rows]), np.concatenate([nothing, *targets]))


def lay_out(segments: Iterable[Prompt | Response], encoder: SegmentEncoder, *, begins: bool = True) -> Layout:
    """Segments as pieces to be tokenized, behind BOS where they begin the sequence.

    Raises ValueError if a sequence begins with a response, whose first token nothing predicts.
    """
    pieces: list[int | str] = []
    scored: list[int] = []
    first = False
    for segment in segments:
        if isinstance(segment, Response):
            if begins and not pieces:
                raise ValueError(_NO_PROMPT)
            if segment.scored:
                scored.append(len(pieces))
            pieces.append(segment.text)
            continue
        own = _split_controls(segment, encoder)
        if begins and not pieces:
            bos = encoder.bos
            own = own if tuple(own[: len(bos)]) == bos else [*bos, *own]
            text = next((place for place, piece in enumerate(own) if isinstance(piece, str)), None)
            first = text is not None and tuple(own[:text]) == bos
        pieces += own
    return Layout(pieces, begins, first, scored)


def _split_controls(prompt: Prompt, encoder: SegmentEncoder) -> list[int | str]:
    pieces: list[int | str] = []
    for part in prompt.parts:
        for piece in [part.text] if isinstance(part, Slot) else encoder.split_controls(part):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            else:
                pieces.append(piece)
    return pieces


def assemble(layouts: Sequence[Layout], encoder: SegmentEncoder) -> TokenTable:
    """The tokens of many sequences; each distinct text is tokenized once.

    Raises ValueError if the tokenizer turns a text into control tokens, or none stands before a response.
    """
    pieces = _tokenize(layouts, encoder)
    counts = np.array([len(layout.pieces) for layout in layouts], np.int64)
    begin = np.cumsum(counts) - counts
    offsets = pieces.offsets[np.append(begin, len(pieces))]
    turns = np.array([len(layout.scored) for layout in layouts], np.int64)
    scored = np.array([place for layout in layouts for place in layout.scored], np.int64) + np.repeat(begin, turns)
    start, stop = (pieces.offsets[scored + more] - np.repeat(offsets[:-1], turns) for more in (0, 1))
    if ((start == 0) & np.repeat([layout.begins for layout in layouts], turns)).any():
        raise ValueError(_NO_PROMPT)
    spans = np.stack([start, stop], axis=1).astype(np.int32)
    return TokenTable(Ragged(pieces.values, offsets), Ragged(spans, np.concatenate([[0], np.cumsum(turns)])))


def _tokenize(layouts: Sequence[Layout], encoder: SegmentEncoder) -> Ragged:
    """The tokens of every piece of every layout."""
    numbers: dict[int | tuple[str, bool], int] = {}  # of each distinct control token, text, and text that comes first
    places: list[int] = []
    for layout in layouts:
        first = layout.first and not encoder.keeps_text
        for piece in layout.pieces:
            key = piece if isinstance(piece, int) else (piece, first)
            first = first and isinstance(piece, int)
            places.append(numbers.setdefault(key, len(numbers)))
    tokens = [np.array([key] if isinstance(key, int) else [], np.int32) for key in numbers]
    for first in (False, True):
        texts = {key[0]: number for key, number in numbers.items() if isinstance(key, tuple) and key[1] == first}
        for number, ids in zip(texts.values(), encoder.texts(list(texts), first), strict=True):
            tokens[number] = ids
    return Ragged.join([tokens[place] for place in places])
