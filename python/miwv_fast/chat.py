"""The tokenizer's own chat template: what it writes around the messages of a conversation, as texts to be tokenized."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from functools import lru_cache

from miwv_fast.assembly import Layout, Prompt, Response, Slot, TokenSequence, assemble, lay_out
from miwv_fast.sandbox import SLOT, check_length, check_source, limits, slot
from miwv_fast.shapes import Record, Turn
from miwv_fast.tokens import SegmentEncoder

# What `strftime_now` gives to chat templates that read the clock, so that a score does not depend on the day.
CHAT_DATE = datetime.datetime(2026, 1, 1)
_DIRECTIVES = ("%-d", "%-m", "%d", "%b", "%B", "%m", "%y", "%Y", "%a", "%A", "%H", "%I", "%M", "%S", "%p", "%j")
# Conversations by their roles, of which data of many turns, each behind a demonstration, have thousands.
_CACHED = 4096
# Stands before such a template, where it shadows the clock.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('{directive}', '{CHAT_DATE.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{% endmacro +%}"
)


class ChatTemplate:
    """The tokenizer's own chat template; demonstration and record are turns of one conversation.

    What stands before a response is what the template writes there in a conversation that holds it, as in training:
    not the generation prompt, which may open a thought or leave the channel to the model. Blanks that the template
    takes off a message are taken off; one that it writes right before a response is tokenized with it.
    """

    name = "chat"

    def __init__(self, encoder: SegmentEncoder, include_eos: bool) -> None:
        self.encoder = encoder
        if not encoder.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use template='alpaca' or 'plain'")
        self.source = str(encoder.tokenizer.get_chat_template())
        check_source("the chat template", self.source)
        self._template = (_FIXED_CLOCK if "strftime_now" in self.source else "") + self.source
        self._render = lru_cache(_CACHED)(self._render_uncached)
        self._allows = lru_cache(_CACHED)(self._allows_uncached)
        self.end_of_turn = self._find_end_of_turn() if include_eos else None

    def zero_shot(self, record: Record) -> TokenSequence:
        """The record alone, every response token scored."""
        return assemble([self.alone(record)], self.encoder).sequence(0, self.end_of_turn)

    def one_shot(self, demonstration: Record, record: Record) -> TokenSequence:
        """The record's turns after the demonstration's; the scored tokens are those of `zero_shot(record)`.

        The demonstration's system text stands in front. The record's own is dropped where it is the same.
        """
        return assemble([self.behind(demonstration, record)], self.encoder).sequence(0, self.end_of_turn)

    def alone(self, record: Record) -> Layout:
        """The layout of `zero_shot`."""
        return self._lay_out(self._after([], record, record.system), len(record.turns))

    def behind(self, demonstration: Record, record: Record) -> Layout:
        """The layout of `one_shot`."""
        before = self._after([], demonstration, demonstration.system)
        system = "" if record.system == demonstration.system else record.system
        return self._lay_out(self._after(before, record, system), len(record.turns))

    def tail(self, record: Record) -> None:
        """The template decides, of all turns together, what stands between them."""

    def _after(self, before: list[tuple[str, str]], record: Record, system: str) -> list[tuple[str, str]]:
        """These messages and the record's; its system text is one where the template takes it there, otherwise it
        stands in front of the first prompt."""
        own = [*before, ("system", system), *_messages(record.turns)]
        if system and self._allows(tuple(role for role, _ in own)):
            return own
        return [*before, *_messages(record.turns_with_system if system else record.turns)]

    def _lay_out(self, messages: list[tuple[str, str]], scored_turns: int) -> Layout:
        roles = tuple(role for role, _ in messages)
        unscored = roles.count("assistant") - scored_turns
        segments: list[Prompt | Response] = []
        prompt: list[str | Slot] = []
        for (role, text), (before, left, right) in zip(messages, self._render(roles), strict=True):
            text = text.lstrip(left).rstrip(right)
            if role != "assistant":
                prompt += [before, Slot(text)]
                continue
            written = before.rstrip(" ") if text else before
            segments.append(Prompt((*prompt, written)))
            segments.append(Response(before[len(written) :] + text, scored=len(segments) > 2 * unscored))
            prompt = []
        return lay_out(segments, self.encoder)

    def _render_uncached(self, roles: tuple[str, ...]) -> list[tuple[str, str | None, str | None]]:
        """Of each message the text before it, and what the template takes off its left and right, as `str.strip` does.

        None stands for all blanks.
        """
        plain = self._around(roles)
        left = {blank: self._around(roles, left=blank) for blank in "\n "}
        right = {blank: self._around(roles, right=blank) for blank in "\n "}

        def taken(padded: dict[str, list[str]], place: int) -> str | None:
            blanks = "".join(blank for blank, around in padded.items() if around[place] == plain[place])
            return None if blanks == "\n " else blanks

        each = [(plain[place], taken(left, place), taken(right, place + 1)) for place in range(len(roles))]
        distinct = {written: written for written in each}  # few are: what is cached holds each of them once
        return [distinct[written] for written in each]

    def _around(self, roles: tuple[str, ...], left: str = "", right: str = "") -> list[str]:
        """The template's text before the first of these messages, between them, and behind the last."""
        messages = [{"role": role, "content": left + slot(place) + right} for place, role in enumerate(roles)]
        with limits(f"the chat template cannot render the messages {', '.join(roles)}"):
            text = self.encoder.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self._template)
        parts = SLOT.split(check_length("the chat template", str(text)))
        if parts[1::2] != [str(place) for place in range(len(roles))]:
            raise ValueError(f"the chat template does not write each of the messages {', '.join(roles)} once, in order")
        return parts[::2]

    def _allows_uncached(self, roles: tuple[str, ...]) -> bool:
        try:
            self._render(roles)
        except ValueError:
            return False
        return True

    def _find_end_of_turn(self) -> int:
        """The first control token that the template writes behind a response, otherwise the tokenizer's EOS."""
        tail = self._around(("user", "assistant"))[-1]
        pieces = self.encoder.split_controls(tail)
        end = next((piece for piece in pieces if isinstance(piece, int)), self.encoder.tokenizer.eos_token_id)
        if end is None:
            raise ValueError("include_eos=True, but neither the chat template nor the tokenizer ends a turn")
        return int(end)


def _messages(turns: Iterable[Turn]) -> list[tuple[str, str]]:
    return [message for turn in turns for message in (("user", turn.prompt), ("assistant", turn.response))]
