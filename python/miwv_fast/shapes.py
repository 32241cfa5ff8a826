"""The four shapes of an instruction record, recognised by their keys, and the one form that they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

from miwv_fast.fields import (
    MalformedRecord,
    as_list,
    check_text,
    describe,
    is_empty,
    is_list,
    is_null,
    name_fields,
    read_text,
    show,
)

# The usual name of each role first.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
# The names of a message's role, and beside each those of its text, the usual one first.
_TEXT_KEYS = {"role": ("content", "value", "text"), "from": ("value", "content", "text")}


@dataclass(frozen=True, slots=True)
class Turn:
    """One instruction, the input that belongs to it (often empty), and the response to be scored."""

    instruction: str
    input: str
    response: str

    @property
    def prompt(self) -> str:
        """The instruction, and the input on a line of its own where there is one."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Record:
    """A record in the one form that the rest of the package knows: a system text and one or more turns."""

    index: int
    id: str | None
    system: str
    turns: tuple[Turn, ...]

    @property
    def embedded_text(self) -> str:
        """What the neighbour search compares: instruction and input, or all user turns, joined by newlines."""
        return "\n".join(turn.prompt for turn in self.turns)

    @property
    def turns_with_system(self) -> tuple[Turn, ...]:
        """The turns, with the system text in front of the first instruction where there is one."""
        if not self.system:
            return self.turns
        first = self.turns[0]
        return (Turn(f"{self.system}\n\n{first.instruction}", first.input, first.response), *self.turns[1:])


def parse_record(value: object, index: int = 0) -> Record:
    """Reads one record of any of the four shapes, recognised by its keys.

    Shapes: Alpaca (`instruction`, `input`, `output`, or Dolly's `context` and `response`), a pair such as `prompt` with
    `completion` or `response`, which may be lists of messages, or `question` with `answer` (PAIRS has all), OpenAI
    `messages`, ShareGPT `conversations` (or `conversation`), with either's names for role and text, bare texts by
    turns, or objects of `input` and `output`; with any of them the text of `system` or `system_prompt`, unless the
    conversation has its own, and with the first two the turns of `history` before it, a list of pairs, as
    LLaMA-Factory has it. Where nothing of these is there, `input` with `output`, or texts by turns in `data`. Raises
    MalformedRecord (a ValueError) that says what is wrong.

    >>> parse_record({"instruction": "Add.", "input": "1 and 2", "output": "3"}).turns
    (Turn(instruction='Add.', input='1 and 2', response='3'),)
    """
    if not isinstance(value, Mapping):
        raise MalformedRecord(f"a record is an object with named fields, this is {describe(value)}")
    record_id = _own_id(value.get("id"))
    shape, system_name = recognize(value), system_field(value)
    beside = read_text(value, system_name) if system_name else ""
    if isinstance(shape, Pair) and shape.is_conversation(value):
        prompt, response = (as_list(value[name], name, "messages") for name in (shape.instruction, shape.response))
        if not _answers(response, message_keys(prompt)[0]):
            raise MalformedRecord(f"{shape.response!r} has no assistant message")
        system, turns = _read_conversation([*prompt, *response], str(shape))
    elif isinstance(shape, Pair):
        input = "\n".join(filter(None, (read_text(value, name) for name in shape.inputs)))
        turn = Turn(read_text(value, shape.instruction), input, read_text(value, shape.response))
        return Record(index, record_id, beside, (*_read_history(value.get("history")), turn))
    else:
        messages = as_list(value[shape], shape, "messages")
        if messages and _is_turn(messages[0]):
            return Record(index, record_id, beside, tuple(_read_turns(messages, shape)))
        if shape in ("conversations", "data") and all(isinstance(message, str) for message in messages):  # LIMA
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        system, turns = _read_conversation(messages, shape)
    return Record(index, record_id, system or beside, turns)


@dataclass(frozen=True, slots=True)
class Pair:
    """The fields of a single instruction and response; those of the input, if any, need not be there."""

    instruction: str
    inputs: tuple[str, ...]
    response: str

    def __str__(self) -> str:
        return f"{self.instruction} and {self.response}"

    @property
    def fields(self) -> tuple[str, ...]:
        return self.instruction, *self.inputs, self.response

    def is_conversation(self, value: Mapping[str, Any]) -> bool:
        """Whether a record of this shape has messages in place of texts, as TRL's conversational form has."""
        return self.instruction == "prompt" and is_list(value.get("prompt"))


# The first of which a record has instruction and response counts.
PAIRS = (
    Pair("instruction", ("input",), "output"),
    Pair("prompt", (), "completion"),
    Pair("prompt", (), "response"),
    Pair("instruction", ("input", "context"), "response"),
    Pair("question", ("context",), "answer"),
    Pair("question", ("context",), "response"),  # OpenOrca
    Pair("query", (), "response"),  # MetaMathQA
    Pair("problem", (), "solution"),  # NuminaMath, Magicoder
    Pair("query", (), "answer"),  # CodeFeedback
    Pair("problem", (), "generated_solution"),  # OpenMathInstruct-2
    Pair("definition", ("inputs",), "targets"),  # Natural Instructions
    Pair("inputs", (), "targets"),  # Aya, FLAN, xP3
)
# Names that tell little: those of OpenCodeInstruct and UltraChat, which count where nothing else tells the shape.
_BARE_PAIR, _BARE_TEXTS = Pair("input", (), "output"), "data"
SYSTEM_FIELDS = ("system", "system_prompt")


def recognize(value: Mapping[str, Any]) -> Pair | str:
    """A record's shape: a pair, or the field of a conversation: `messages`, `conversations`, `conversation` or `data`.

    Fields without a value, NaN and empty lists included, count where no shape has all of its own: a table of several
    shapes has nulls. Raises MalformedRecord if it has none of the four.

    >>> recognize({"prompt": "Hi", "response": "Hello"})
    Pair(instruction='prompt', inputs=(), response='response')
    """
    present = {key for key, item in value.items() if not (is_null(item) or (isinstance(item, list) and not item))}
    conversations = ("messages", "conversations")
    if found := [name for name in conversations if name in present]:
        return found[0]
    for known in (present, value.keys()):
        for pair in PAIRS:
            if pair.instruction in known and pair.response in known:
                return pair
        if "conversation" in known:  # LMSYS-Chat, WildChat
            return "conversation"
    if found := [name for name in conversations if name in value]:
        return found[0]
    if not any(pair.instruction in value for pair in PAIRS):
        if _BARE_PAIR.instruction in value and _BARE_PAIR.response in value:
            return _BARE_PAIR
        texts = value.get(_BARE_TEXTS)
        if is_list(texts) and all(isinstance(text, str) for text in as_list(texts, _BARE_TEXTS, "texts")):
            return _BARE_TEXTS
    raise MalformedRecord(
        f"its fields name no known shape; expected {', '.join(map(str, PAIRS))}, messages, conversations or "
        f"conversation, or else {_BARE_PAIR}, or texts in {_BARE_TEXTS}, found: {name_fields(value)}"
    )


def system_field(value: Mapping[str, Any]) -> str | None:
    """Where a system text beside the rest stands: the first of SYSTEM_FIELDS that is not empty, None if all are."""
    return next((name for name in SYSTEM_FIELDS if not is_empty(value.get(name))), None)


def read_id(value: object) -> str | None:
    """A record's own `id`, None where it has none; also of what is no record otherwise."""
    try:
        return _own_id(value.get("id")) if isinstance(value, Mapping) else None
    except MalformedRecord:
        return None


def _own_id(value: object) -> str | None:
    # In a column with gaps whole numbers are floats.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | Integral):
        return None
    try:
        text = str(value)
    except ValueError as error:
        raise MalformedRecord(f"'id' cannot be written: {error}") from None
    check_text("id", text)
    return text


def message_keys(messages: Sequence[object]) -> tuple[str, str]:
    """The names of a message's role and text, told by the first that has them.

    They are OpenAI's `role` and `content`, ShareGPT's `from` and `value`, one of each, or `text`.

    >>> message_keys([{"role": "user", "content": "Hi"}])
    ('role', 'content')
    """
    role = _first_key(messages, tuple(_TEXT_KEYS))
    return role, _first_key(messages, _TEXT_KEYS[role])


def _first_key(messages: Sequence[object], names: Sequence[str]) -> str:
    """The first of these names under which a message has a value, or has nothing, otherwise the first of all."""
    objects = [message for message in messages if isinstance(message, Mapping)]
    held = (name for message in objects for name in names if not is_null(message.get(name)))
    there = (name for message in objects for name in names if name in message)
    return next(chain(held, there, names))


def _read_conversation(messages: Sequence[object], name: str) -> tuple[str, tuple[Turn, ...]]:
    """Everything up to the last assistant turn, as a system text and pairs of user and assistant text."""
    role_key, text_key = message_keys(messages)
    system, turns, user = "", [], None
    answers = _answers(messages, role_key)
    for position, message in enumerate(messages[: answers[-1] + 1] if answers else messages):
        where = f"{name}[{position}]"
        if not isinstance(message, Mapping):
            raise MalformedRecord(f"{where} should be an object, it is {describe(message)}")
        role = _role(message, role_key)
        if role is None:
            raise MalformedRecord(f"{where} has {role_key} {show(message.get(role_key))}; known are {', '.join(ROLES)}")
        if text_key not in message:
            raise MalformedRecord(f"{where} should have its text in {text_key!r}, found: {name_fields(message)}")
        text = _content(message, text_key, where)
        if role == "system":
            if position:
                raise MalformedRecord(f"{where}: a system message may only come first")
            system = text
        elif role == "user":
            if user is not None:
                raise MalformedRecord(f"{where}: two user messages in a row")
            user = text
        else:
            if user is None:
                raise MalformedRecord(f"{where}: an assistant message that follows no user message")
            turns.append(Turn(user, "", text))
            user = None
    if not turns:
        if user is None:
            raise MalformedRecord(f"{name!r} has no user message")
        turns.append(Turn(user, "", ""))
    return system, tuple(turns)


def _is_turn(value: object) -> bool:
    """Whether a prompt and its answer stand in one object, as in Capybara."""
    return (
        isinstance(value, Mapping)
        and "input" in value
        and "output" in value
        and all(is_null(value.get(role)) for role in _TEXT_KEYS)
    )


def _read_turns(turns: Sequence[Any], name: str) -> Iterator[Turn]:
    for position, turn in enumerate(turns):
        where = f"{name}[{position}]"
        if not _is_turn(turn):
            raise MalformedRecord(f"{where} should be an object with input and output, it is {describe(turn)}")
        yield Turn(read_text(turn, "input", where), "", read_text(turn, "output", where))


def _answers(messages: Sequence[object], role_key: str) -> list[int]:
    """The places of the assistant's messages."""
    return [place for place, message in enumerate(messages) if _role(message, role_key) == "assistant"]


def _role(message: object, key: str) -> str | None:
    said = message.get(key) if isinstance(message, Mapping) else None
    return ROLES.get(said) if isinstance(said, str) else None


def _read_history(history: object) -> Iterator[Turn]:
    """Earlier turns: pairs of instruction and response."""
    if is_empty(history):
        return
    for position, pair in enumerate(as_list(history, "history", "pairs")):
        where = f"history[{position}]"
        said = as_list(pair, where, "an instruction and a response")
        if len(said) != 2:
            raise MalformedRecord(f"{where} should be an instruction and a response, it has {len(said)} items")
        named = {"instruction": said[0], "response": said[1]}
        yield Turn(read_text(named, "instruction", where), "", read_text(named, "response", where))


def _content(message: Mapping[str, Any], key: str, where: str) -> str:
    """A message's text; OpenAI's list of parts is joined where all parts are text."""
    content = message.get(key)
    if not isinstance(content, list):
        return read_text(message, key, where)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind != "text":
            raise MalformedRecord(f"{where}: only text can be scored, found a part that is {describe(part)}")
        parts.append(read_text(part, "text", where))
    return "".join(parts)
