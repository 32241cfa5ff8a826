"""Chat templates of many models, as TRL ships them: a conversation stands as each writes it.

Skipped where TRL is not installed; `pip install --no-deps trl` is enough. `python tests/test_chat_templates.py` says by
how many of them a record's own sequence begins those that demonstrate with it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from miwv_fast.shapes import parse_record
from miwv_fast.templates import ChatTemplate, load_template
from miwv_fast.tokens import SegmentEncoder
from support import byte_level

_TRL = find_spec("trl")
FILES = sorted(Path(str(_TRL.origin)).parent.glob("chat_templates/*.jinja")) if _TRL else []
# Those of models that see take a message's text as a list of parts only.
SEEING = ("idefics3", "llava_next", "smolvlm")


def load(file: Path) -> ChatTemplate:
    tokenizer = byte_level(bos_and_eos=True)
    tokenizer.chat_template = file.read_text()
    template = load_template("chat", tokenizer)
    assert isinstance(template, ChatTemplate)
    return template


def conversation(*texts: str, system: str = "") -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + said


@pytest.mark.skipif(not FILES, reason="TRL is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("system", ["", "Be kind.", "\n Be kind. \n"])
@pytest.mark.parametrize("texts", [("one", "uno"), (" \none", "uno\n", "\n\ttwo \n", "\n dos \n\n")])
def test_texts_are_those_of_the_template(file, system, texts):
    if file.stem.startswith(SEEING):
        pytest.skip("takes parts of messages, not text")
    template = load(file)
    messages = conversation(*texts, system=system)
    try:
        # The template's own source, with its clock stopped where it has one.
        tokenizer = template.encoder.tokenizer
        expected = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template._template)
    except Exception as error:
        assert system, error
        pytest.skip(f"no system messages: {error}")
    sequence = template.zero_shot(parse_record({"messages": messages}))
    encoder = SegmentEncoder(tokenizer)
    text = encoder.decode(sequence.ids)
    bos = encoder.decode(encoder.bos)
    assert expected.removeprefix(bos).startswith(text.removeprefix(bos))
    assert text.rstrip().endswith(texts[-1].strip())


def main() -> None:
    shared = {}
    for file in FILES:
        if not file.stem.startswith(SEEING):
            template = load(file)
            demonstration, record = (
                parse_record({"messages": conversation(*texts)}) for texts in (("one", "uno"), ("two", "dos"))
            )
            alone = template.zero_shot(demonstration).ids.tolist()
            shared[file.stem] = template.one_shot(demonstration, record).ids.tolist()[: len(alone)] == alone
    print(
        f"{sum(shared.values())} of {len(shared)} share; not:", *(name for name, shares in shared.items() if not shares)
    )


if __name__ == "__main__":
    main()
