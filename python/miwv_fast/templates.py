"""Templates by name or from a Jinja file, and the prompts that they write around instructions and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.sandbox

from miwv_fast.assembly import Layout, Prompt, Response, Slot, TokenSequence, assemble, lay_out
from miwv_fast.chat import ChatTemplate
from miwv_fast.sandbox import SLOT, check_length, check_source, limits, slot
from miwv_fast.shapes import Record
from miwv_fast.tokens import SegmentEncoder

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

# Instruction and input that a filter, a slice or a condition on their text would show in: short, and long with blanks
# around, both cases and markup.
_PROBES = (
    ("x", "y"),
    (" \tGr\u00fc\u00dfe, <b>A &\"'</b>\n" + "some Words " * 300, "OTHER <i>&'\"</i>\n\n" * 300 + " \t"),
)


class Template(Protocol):
    """Turns records into token sequences, one at a time, or into layouts, from which many are assembled at once.

    `end_of_turn` is the token that is scored behind each scored response, None where none is.
    """

    name: str
    source: str
    encoder: SegmentEncoder
    end_of_turn: int | None

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        ...

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """The record behind the demonstration; the scored tokens are those of `zero_shot(record)`."""
        ...

    def alone(self, record: Record) -> Layout:
        """The layout of `zero_shot`."""
        ...

    def behind(self, demonstration: Record, record: Record) -> Layout:
        """The layout of `one_shot`."""
        ...

    def tail(self, record: Record) -> Layout | None:
        """What follows a demonstration's own sequence in `behind`, whatever that is; None where it depends on it."""
        ...


def read_template(template: str | Path) -> str | None:
    """The Jinja source of a template given by name or file, None for `chat`, whose source the tokenizer holds.

    Raises ValueError for an unknown name or a file that is not UTF-8, FileNotFoundError for a missing file.
    """
    if not isinstance(template, str | Path):
        raise TypeError(f"template should be a name or the path of a Jinja file, it is {template!r}")
    if template == "chat":
        return None
    if template in ("alpaca", "plain"):
        return {"alpaca": ALPACA, "plain": PLAIN}[str(template)]
    path = Path(template)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise ValueError(f"unknown template {str(template)!r}; known are alpaca, plain, chat, or a .jinja file")
    if not path.is_file():
        raise FileNotFoundError(f"no such template file: {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {path} is not UTF-8: {error.reason} at byte {error.start}") from error


def check_template(template: str | Path) -> None:
    """Raises, before there is a tokenizer, what `load_template` raises for a template that is not `chat`."""
    source = read_template(template)
    if source is not None:
        _PairPrompt(str(template), source)


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


def _fill(rendered: Sequence[str | int], texts: Sequence[str]) -> Prompt:
    return Prompt(tuple(part if isinstance(part, str) else Slot(texts[part]) for part in rendered))


def _split_slots(text: str) -> list[str | int]:
    """Template text and slot numbers, in order."""
    parts = SLOT.split(text)
    return [int(part) if place % 2 else part for place, part in enumerate(parts) if place % 2 or part]


def compile_pair(name: str, source: str) -> tuple[Callable[[str, str], str], str]:
    """`prompt(instruction, input)` and the separator of a Jinja source; ValueError where it doesn't define them."""
    # Unlike chat templates, whose whitespace their authors tuned under trim_blocks, these keep Jinja's defaults
    # and the newline at their end.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    check_source(f"template {name}", source)
    with limits(f"template {name}"):
        module: Any = environment.from_string(source).module
        missing = [part for part in ("prompt", "separator") if not hasattr(module, part)]
        if missing:
            raise ValueError(f"it should define a macro prompt(instruction, input) and set separator: no {missing[0]}")
        separator = check_length(f"template {name}", str(module.separator))
    return lambda instruction, input: str(module.prompt(instruction=instruction, input=input)), separator


class _PairPrompt:
    """The prompt of a Jinja source, compiled and tried; `separator` stands between pairs."""

    def __init__(self, name: str, source: str) -> None:
        self._name = name
        self._macro, self.separator = compile_pair(name, source)
        self.render = lru_cache(self._render)
        for has_input in (False, True):
            self.render(True, has_input)

    def _render(self, has_instruction: bool, has_input: bool) -> list[str | int]:
        with limits(f"template {self._name}"):
            text = self._macro(slot(0) if has_instruction else "", slot(1) if has_input else "")
        check_length(f"template {self._name}", text)
        if text.endswith((" ", "\t")):
            raise ValueError(f"template {self._name}: the prompt ends in a space; end it in a newline")
        rendered = _split_slots(text)
        if has_instruction and 0 not in rendered:
            raise ValueError(f"template {self._name}: the prompt does not contain the instruction as it is")
        for texts in _PROBES:
            with limits(f"template {self._name}"):
                real = self._macro(texts[0] if has_instruction else "", texts[1] if has_input else "")
            if real != "".join(part if isinstance(part, str) else texts[part] for part in rendered):
                raise ValueError(
                    f"template {self._name}: it changes the instruction or input, or looks into it; it may only place "
                    "them, as they are"
                )
        return rendered


class PairTemplate:
    """Prompt-response pairs joined by a separator: `alpaca`, `plain`, and Jinja files.

    The Jinja source defines a macro `prompt(instruction, input)` and a variable `separator`.
    """

    def __init__(self, name: str, source: str, encoder: SegmentEncoder, include_eos: bool) -> None:
        self.name = name
        self.source = source
        self.encoder = encoder
        self.end_of_turn = encoder.tokenizer.eos_token_id if include_eos else None
        if include_eos and self.end_of_turn is None:
            raise ValueError("include_eos=True, but the tokenizer has no end-of-sequence token")
        prompt = _PairPrompt(name, source)
        self._between, self._render = Prompt((prompt.separator,)), prompt.render

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        return assemble([self.alone(record)], self.encoder).sequence(0, self.end_of_turn)

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """Demonstration, separator, record; the scored tokens are those of `zero_shot(record)`."""
        return assemble([self.behind(demonstration, record)], self.encoder).sequence(0, self.end_of_turn)

    def alone(self, record: Record) -> Layout:
        """The layout of `zero_shot`."""
        return lay_out(self._segments(record, scored=True), self.encoder)

    def behind(self, demonstration: Record, record: Record) -> Layout:
        """The layout of `one_shot`."""
        segments = [*self._segments(demonstration, scored=False), self._between, *self._segments(record, scored=True)]
        return lay_out(segments, self.encoder)

    def tail(self, record: Record) -> Layout:
        """Separator and record: segments are tokenized one by one, so it is the same behind all demonstrations."""
        return lay_out([self._between, *self._segments(record, scored=True)], self.encoder, begins=False)

    def _segments(self, record: Record, scored: bool) -> list[Prompt | Response]:
        segments: list[Prompt | Response] = []
        for turn in record.turns_with_system:
            if segments:
                segments.append(self._between)
            rendered = self._render(bool(turn.instruction), bool(turn.input))
            if turn.input and 1 not in rendered:  # which data without inputs can do with
                raise ValueError(
                    f"template {self.name}: the prompt does not contain the input, and this record has one"
                )
            segments.append(_fill(rendered, (turn.instruction, turn.input)))
            segments.append(Response(turn.response, scored))
        return segments
