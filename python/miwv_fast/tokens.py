"""Text to tokens such that decoding gives the text back and text from data never becomes a control token."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

# Texts that later segments are encoded behind. One that ends in a newline rarely merges with what follows; the
# others are for texts that begin with a newline, and for tokenizers that do not know the newline.
_ANCHORS = ("\n", "a", ".", "0", "\u3042")
_PROBE = "Gr\u00fc\u00dfe, 42 \u65e5\u672c\n\tx = [1.5];  def f(x):\r\n\U0001f600 don't"
_BLANKS = " \t\r\n\u2581"
_CALL_CHARACTERS = 1 << 20  # a tokenizer's result takes some 50 times the text


class SegmentEncoder:
    """Encodes the segments of a sequence one by one, so that boundaries between them are token boundaries.

    `bos` is what the tokenizer puts before every text. `text` and `texts` are for data: spellings of control tokens
    become ordinary tokens, and characters that the vocabulary does not know its unknown token. `split_controls` is for
    templates: it finds the control tokens that a template writes. `keeps_text`: a text has the same tokens wherever it
    stands.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._controls = {
            token.content: (number, token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.strip(_BLANKS)
        }
        self._control_ids = frozenset(number for number, _ in self._controls.values())
        # A vocabulary without bytes has a token for characters that it does not know, which may mean an end as well.
        unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self._refused = self._control_ids - unknown
        spellings = sorted(self._controls, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        # Blanks that a control token swallows by its own definition are swallowed in templates only.
        self._swallowing = re.compile("|".join(map(self._pattern, spellings)) or r"(?!)")
        self._backend = _without_controls(tokenizer, self._controls)
        self._warned = False
        self.bos = self._find_bos()
        self.keeps_text = all(
            self._decode(self._raw(left) + self._raw(right)) == left + right
            for left, right in (("a", "b"), ("a", " b"), ("a", "\nb"), ("a\n", "b"))
        )
        self.split_controls = lru_cache(maxsize=1024)(self._split_controls)

    def texts(self, texts: Sequence[str], first: bool) -> list[np.ndarray]:
        """`text` of each, int32, many texts at a time: by all cores where the tokenizer can."""
        if self._backend is None:
            return [np.array(self.text(text, first), np.int32) for text in texts]
        anchor = "" if first or self.keeps_text else _ANCHORS[0]
        before = self._raw(anchor)
        back = self._decode(before)
        result = []
        for chunk in _chunks(texts):
            encoded = self._backend.encode_batch_fast([anchor + text for text in chunk], add_special_tokens=False)
            tokens = [encoding.ids for encoding in encoded]
            decoded = self._backend.decode_batch(tokens, skip_special_tokens=False) if anchor else ()
            for place, (text, ids) in enumerate(zip(chunk, tokens, strict=True)):
                own = ids[len(before) :]
                kept = not anchor or (ids[: len(before)] == before and decoded[place] == back + text)
                usual = kept and self._control_ids.isdisjoint(own)
                result.append(np.array(own if usual else self.text(text, first), np.int32))
        return result

    def text(self, text: str, first: bool) -> list[int]:
        """Tokens of one segment; `first` says that nothing but BOS comes before it in the sequence."""
        ids = self._segment(text, first)
        if not self._control_ids.isdisjoint(ids):
            # A vocabulary that holds the spelling itself: cut inside each spelling, which no token can then span.
            cuts = [0, *(match.start() + 1 for match in self._spelling.finditer(text)), len(text)]
            ids = []
            for begin, end in pairwise(cuts):
                ids += self._segment(text[begin:end], first and begin == 0)
            if not self._refused.isdisjoint(ids):
                raise ValueError(f"the tokenizer turns text into control tokens: {text[:60]!r}")
        return ids

    def _split_controls(self, template_text: str) -> tuple[str | int, ...]:
        """Text and control token ids, in order, of a piece of a template."""
        parts: list[str | int] = []
        end = 0
        for match in self._swallowing.finditer(template_text):
            spelling = self._spelling.search(match.group())
            assert spelling is not None
            parts += [template_text[end : match.start()], self._controls[spelling.group()][0]]
            end = match.end()
        return tuple(part for part in [*parts, template_text[end:]] if part != "")

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's vocabulary, merges, added tokens and rules, hexadecimal."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        # What the tokenizer puts around texts is not all in its backend, and a slow one's rules are code and files.
        named = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}  # for chat templates
        rules = [type(self.tokenizer).__name__, self.bos, self.tokenizer.eos_token_id, self._raw(_PROBE), named]
        return hashlib.sha256(text.encode() + json.dumps(rules, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a sequence of tokens, control tokens included, as it was before it was encoded."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _segment(self, text: str, first: bool) -> list[int]:
        if first or self.keeps_text or not text:
            return self._raw(text)
        for anchor in _ANCHORS:
            before, both = self._raw(anchor), self._raw(anchor + text)
            ids = both[len(before) :]
            if both[: len(before)] == before and self._decode(both) == self._decode(before) + text:
                return ids
        if not self._warned:
            self._warned = True
            _log.warning("this tokenizer cannot give back every text exactly, for example %r", text[:60])
        before = self._raw(_ANCHORS[0])
        both = self._raw(_ANCHORS[0] + text)
        return both[len(before) :] if both[: len(before)] == before else self._raw(text)

    def _raw(self, text: str) -> list[int]:
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def _decode(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=False))
        return self.decode(ids)

    def _find_bos(self) -> tuple[int, ...]:
        """What the tokenizer adds before a text; looking at a text tells it from an EOS with the same id."""
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        full = self.tokenizer.encode("a", add_special_tokens=True)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start])
        return ()

    def _pattern(self, spelling: str) -> str:
        token = self._controls[spelling][1]
        return (r"\s*" if token.lstrip else "") + re.escape(spelling) + (r"\s*" if token.rstrip else "")


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError for one that does not tell its control tokens, as that of mistral-common."""
    if not isinstance(getattr(tokenizer, "added_tokens_decoder", None), Mapping):
        raise ValueError(
            f"the tokenizer, a {type(tokenizer).__name__}, does not tell its control tokens; give as tokenizer "
            "(--tokenizer) a repository or folder that has a tokenizer.json and no tekken.json"
        )


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in turn, about a million characters at a time."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CALL_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _without_controls(tokenizer: Any, controls: dict[str, Any]) -> Any:
    """A copy of a fast tokenizer's backend that knows no control tokens, None if there is no such backend.

    Added tokens that are nothing but blanks stay: they are vocabulary (GPT-NeoX, Gemma), not control.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec.update(post_processor=None, truncation=None, padding=None)
    vocabulary = spec["model"].get("vocab", {})
    known = {entry[0] for entry in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    kept = []
    for token in spec["added_tokens"]:
        if token["content"] not in controls:
            kept.append(token)
        elif token["content"] not in known:
            # Numbered after the vocabulary: without a placeholder the tokens behind it would move up.
            # It is drawn anew, so that no text can hold it.
            kept.append(
                {**token, "content": f"\ufdd0{secrets.token_hex(16)}\ufdd1", "special": False, "normalized": False}
            )
    spec["added_tokens"] = kept
    return Tokenizer.from_str(json.dumps(spec))
