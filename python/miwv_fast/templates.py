"""Records to token sequences: the templates, where the scored tokens stand, and what is cut when room is short."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.sandbox
import numpy as np

from miwv_fast.records import Record, Turn
from miwv_fast.tokens import SegmentEncoder

# What `strftime_now` gives to chat templates that read the clock, so that a score does not depend on the day.
CHAT_DATE = datetime.datetime(2026, 1, 1)
_DIRECTIVES = ("%-d", "%-m", "%d", "%b", "%B", "%m", "%y", "%Y", "%a", "%A", "%H", "%I", "%M", "%S", "%p", "%j")
# Stands before such a template, where it shadows the clock.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{CHAT_DATE.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro +%}"
)

# The two prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), with a newline at their end.
ALPACA = """\
{%- set separator = "\\n\\n" -%}
{%- macro prompt(instruction, input) -%}
{%- if input -%}
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Input:
{{ input }}

### Response:
{% else -%}
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{{ instruction }}

### Response:
{% endif -%}
{%- endmacro -%}
"""

PLAIN = """\
{%- set separator = "\\n\\n" -%}
{%- macro prompt(instruction, input) -%}
User: {{ instruction }}
{% if input %}{{ input }}
{% endif -%}
Assistant:
{% endmacro -%}
"""

# Noncharacters, which no text holds: a template is rendered around numbered slots, never around data.
_SLOT = re.compile("\ufdd0([0-9]+)\ufdd1")


def _slot(number: int) -> str:
    return f"\ufdd0{number}\ufdd1"


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

    def behind(self, length: int) -> TokenSequence:
        """What follows the first `length` tokens, none of which is read for a target."""
        return TokenSequence(self.ids[length:], self.rows - length, self.targets)


class Template(Protocol):
    """Turns records into token sequences."""

    name: str
    source: str
    encoder: SegmentEncoder

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        ...

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """The record behind the demonstration; the scored tokens are those of `zero_shot(record)`."""
        ...


def read_template(template: str | Path) -> str | None:
    """The Jinja source of a template given by name or file, None for `chat`, whose source the tokenizer holds.

    Raises ValueError for an unknown name, FileNotFoundError for a missing file.
    """
    if template == "chat":
        return None
    if template in ("alpaca", "plain"):
        return {"alpaca": ALPACA, "plain": PLAIN}[str(template)]
    path = Path(template)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise ValueError(f"unknown template {str(template)!r}; known are alpaca, plain, chat, or a .jinja file")
    if not path.is_file():
        raise FileNotFoundError(f"no such template file: {path}")
    return path.read_text(encoding="utf-8")


def load_template(
    template: str | Path, tokenizer: Any, include_eos: bool = False, source: str | None = None
) -> Template:
    """A template by name (`alpaca`, `plain`, `chat`) or from a Jinja file that defines `prompt` and `separator`.

    `source` is what the file held when it was read before, as a run's manifest has it. Raises ValueError for an unknown
    name or a template that cannot be used, FileNotFoundError for a missing file.
    """
    if template == "chat" or source is None:
        source = read_template(template)
    encoder = SegmentEncoder(tokenizer)
    if source is None:
        return ChatTemplate(encoder, include_eos)
    return PairTemplate(str(template), source, encoder, include_eos)


@dataclass(frozen=True)
class _Slot:
    """Text from data inside a prompt, in place of a template's slot."""

    text: str


@dataclass(frozen=True)
class _Prompt:
    """A stretch that is not a response: template text (str) and data (_Slot), tokenized jointly."""

    parts: tuple[str | _Slot, ...]


@dataclass(frozen=True)
class _Response:
    text: str
    scored: bool


def _assemble(
    segments: Iterable[_Prompt | _Response], encoder: SegmentEncoder, end_of_turn: int | None
) -> TokenSequence:
    """Encodes segment after segment; `end_of_turn` is scored behind each scored response unless it is None."""
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for segment in segments:
        if isinstance(segment, _Prompt):
            _append_prompt(ids, segment, encoder)
            continue
        if not ids:
            raise ValueError("the template writes nothing before the response, so its first token has no prediction")
        tokens = encoder.text(segment.text, first=False)
        if segment.scored:
            rows += range(len(ids) - 1, len(ids) - 1 + len(tokens))
            targets += tokens
        ids += tokens
        if segment.scored and end_of_turn is not None:
            rows.append(len(ids) - 1)
            targets.append(end_of_turn)
    return TokenSequence(np.array(ids, np.int32), np.array(rows, np.int32), np.array(targets, np.int32))


def _append_prompt(ids: list[int], prompt: _Prompt, encoder: SegmentEncoder) -> None:
    at_start = not ids
    pieces: list[int | str] = []
    for part in prompt.parts:
        for piece in [part.text] if isinstance(part, _Slot) else encoder.split_controls(part):
            if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                pieces[-1] += piece
            else:
                pieces.append(piece)
    if at_start:
        bos = encoder.bos
        ids += [] if tuple(pieces[: len(bos)]) == bos else bos
        first = next((number for number, piece in enumerate(pieces) if isinstance(piece, str)), None)
        at_start = first is not None and tuple(pieces[:first]) in ((), bos)
    for piece in pieces:
        if isinstance(piece, str):
            ids += encoder.text(piece, first=at_start)
            at_start = False
        else:
            ids.append(piece)


def _fill(rendered: Sequence[str | int], texts: Sequence[str]) -> _Prompt:
    return _Prompt(tuple(part if isinstance(part, str) else _Slot(texts[part]) for part in rendered))


def _split_slots(text: str) -> list[str | int]:
    """Template text and slot numbers, in order."""
    parts = _SLOT.split(text)
    return [int(part) if place % 2 else part for place, part in enumerate(parts) if place % 2 or part]


def _with_system(record: Record, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns with the record's system text in front of the first instruction, where it has one."""
    if not record.system:
        return turns
    first = turns[0]
    return (Turn(f"{record.system}\n\n{first.instruction}", first.input, first.response), *turns[1:])


def compile_pair(name: str, source: str) -> tuple[Callable[[str, str], object], str]:
    """`prompt(instruction, input)` and the separator of a Jinja source; ValueError where it doesn't define them."""
    # Unlike chat templates, whose whitespace their authors tuned under trim_blocks, these keep Jinja's defaults
    # and the newline at their end.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        module: Any = environment.from_string(source).module
        return module.prompt, str(module.separator)
    except jinja2.TemplateError as error:
        raise ValueError(f"template {name}: {error}") from error
    except AttributeError as error:
        raise ValueError(
            f"template {name} should define a macro prompt(instruction, input) and set separator: {error}"
        ) from error


class PairTemplate:
    """Prompt-response pairs joined by a separator: `alpaca`, `plain`, and Jinja files.

    The Jinja source defines a macro `prompt(instruction, input)` and a variable `separator`.
    """

    def __init__(self, name: str, source: str, encoder: SegmentEncoder, include_eos: bool) -> None:
        self.name = name
        self.source = source
        self.encoder = encoder
        self._end_of_turn = encoder.tokenizer.eos_token_id if include_eos else None
        if include_eos and self._end_of_turn is None:
            raise ValueError("include_eos=True, but the tokenizer has no end-of-sequence token")
        self._macro, self._separator = compile_pair(name, source)
        self._render = lru_cache(self._render_uncached)
        for has_input in (False, True):
            self._render(True, has_input)

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        return _assemble(self._segments(record, scored=True), self.encoder, self._end_of_turn)

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """Demonstration, separator, record; the scored tokens are those of `zero_shot(record)`."""
        separator = _Prompt((self._separator,))
        segments = [*self._segments(demonstration, scored=False), separator, *self._segments(record, scored=True)]
        return _assemble(segments, self.encoder, self._end_of_turn)

    def _segments(self, record: Record, scored: bool) -> list[_Prompt | _Response]:
        segments: list[_Prompt | _Response] = []
        for turn in _with_system(record, record.turns):
            if segments:
                segments.append(_Prompt((self._separator,)))
            rendered = self._render(bool(turn.instruction), bool(turn.input))
            segments.append(_fill(rendered, (turn.instruction, turn.input)))
            segments.append(_Response(turn.response, scored))
        return segments

    def _render_uncached(self, has_instruction: bool, has_input: bool) -> list[str | int]:
        try:
            text = str(self._macro(_slot(0) if has_instruction else "", _slot(1) if has_input else ""))
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"template {self.name}: {error}") from error
        if text.endswith((" ", "\t")):
            raise ValueError(f"template {self.name}: the prompt ends in a space; end it in a newline")
        rendered = _split_slots(text)
        if has_instruction and 0 not in rendered:
            raise ValueError(f"template {self.name}: the prompt does not contain the instruction as it is")
        return rendered


class ChatTemplate:
    """The tokenizer's own chat template; demonstration and record are turns of one conversation.

    The whole conversation is rendered once, ending in the generation prompt, and the last response follows.
    """

    name = "chat"

    def __init__(self, encoder: SegmentEncoder, include_eos: bool) -> None:
        self.encoder = encoder
        if not encoder.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use template='alpaca' or 'plain'")
        self.source = str(encoder.tokenizer.get_chat_template())
        self._template = (_FIXED_CLOCK if "strftime_now" in self.source else "") + self.source
        self._render = lru_cache(self._render_uncached)
        self._system_first = self._allows("system", "user")
        self._system_later = self._allows("user", "assistant", "system", "user")
        self._end_of_turn = self._find_end_of_turn() if include_eos else None

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        return self._sequence(self._messages(record), len(record.turns))

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """The record's turns after the demonstration's; the scored tokens are those of `zero_shot(record)`.

        The demonstration's system text stands in front. The record's own is dropped where it is the same.
        """
        later = self._messages(record, drop_system=record.system == demonstration.system, later=True)
        return self._sequence(self._messages(demonstration) + later, len(record.turns))

    def _messages(self, record: Record, drop_system: bool = False, later: bool = False) -> list[tuple[str, str]]:
        turns, messages = record.turns, []
        if record.system and not drop_system:
            if self._system_later if later else self._system_first:
                messages.append(("system", record.system))
            else:
                turns = _with_system(record, turns)
        for turn in turns:
            messages += [("user", turn.prompt), ("assistant", turn.response)]
        return messages

    def _sequence(self, messages: list[tuple[str, str]], scored_turns: int) -> TokenSequence:
        texts = [text for _, text in messages]
        responses = [place for place, (role, _) in enumerate(messages) if role == "assistant"]
        scored = set(responses[-scored_turns:])
        segments: list[_Prompt | _Response] = []
        prompt: list[str | int] = []
        for part in [*self._render(tuple(role for role, _ in messages[:-1])), len(messages) - 1]:
            if part in responses:
                segments += [_fill(prompt, texts), _Response(texts[part], part in scored)]
                prompt = []
            else:
                prompt.append(part)
        return _assemble(segments, self.encoder, self._end_of_turn)

    def _render_uncached(self, roles: tuple[str, ...]) -> list[str | int]:
        rendered = _split_slots(self._apply(roles, add_generation_prompt=True))
        if [part for part in rendered if isinstance(part, int)] != list(range(len(roles))):
            raise ValueError(f"the chat template does not write each of the messages {', '.join(roles)} once, in order")
        return rendered

    def _apply(self, roles: tuple[str, ...], add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": _slot(place)} for place, role in enumerate(roles)]
        try:
            return str(
                self.encoder.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self._template,
                )
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template cannot render the messages {', '.join(roles)}: {error}") from error

    def _allows(self, *roles: str) -> bool:
        try:
            self._render(roles)
        except ValueError:
            return False
        return True

    def _find_end_of_turn(self) -> int:
        """The first control token that the template writes behind a response, otherwise the tokenizer's EOS."""
        tail = _split_slots(self._apply(("user", "assistant"), add_generation_prompt=False))[-1]
        pieces = self.encoder.split_controls(tail) if isinstance(tail, str) else []
        end = next((piece for piece in pieces if isinstance(piece, int)), self.encoder.tokenizer.eos_token_id)
        if end is None:
            raise ValueError("include_eos=True, but neither the chat template nor the tokenizer ends a turn")
        return int(end)
