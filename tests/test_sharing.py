"""What passes have in common is found where it is, is worth what it costs, and changes no sequence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miwv_fast import sharing
from miwv_fast.assembly import TokenSequence
from miwv_fast.engine import Done
from miwv_fast.forest import Unit
from miwv_fast.job import Job
from miwv_fast.neighbors import Neighbors
from miwv_fast.progress import Progress
from miwv_fast.ragged import Ragged
from miwv_fast.records import read_records
from miwv_fast.runner import Sequences, Trees, UnitResult
from miwv_fast.sharing import LEAST_UNITS, find_preambles
from miwv_fast.sources import open_source
from miwv_fast.templates import Template, load_template
from support import byte_level
from test_corpus import REWRITING, assert_same, rows


def most_saved(sequences: list[tuple[tuple[int, ...], int]], least: int, depth: int = 0) -> int:
    """The most that preambles save of (what can be shared, tokens in all) that agree so far: here, or in each group."""
    units = LEAST_UNITS + sum(tokens for _, tokens in sequences) // UNIT
    here = (len(sequences) - units) * depth if depth >= least else 0
    going = [sequence for sequence in sequences if len(sequence[0]) > depth]
    groups = {sequence[depth]: [s for s in going if s[0][depth] == sequence[depth]] for sequence, _ in going}
    return max(here, sum(most_saved(group, least, depth + 1) for group in groups.values()))


UNIT = 10


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=7), st.integers(0, 3), st.integers(0, 12)), max_size=16),
    st.integers(1, 4),
)
def test_no_preambles_save_more(drawn, least):
    ids = Ragged.join([np.array(tokens, np.int32) for tokens, _, _ in drawn])
    reach = np.array([max(0, len(tokens) - kept) for tokens, kept, _ in drawn], np.int64)
    tokens = np.array([each for _, _, each in drawn], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST_SHARED", least)
        found = find_preambles(ids, reach, tokens, UNIT)
    saved = 0
    for number, preamble in enumerate(found.tokens):
        rows = np.flatnonzero(found.of == number)
        for row in rows.tolist():
            assert least <= len(preamble) <= reach[row] and preamble.tolist() == ids[row][: len(preamble)].tolist()
        saved += (len(rows) - LEAST_UNITS - int(tokens[rows].sum()) // UNIT) * len(preamble)
    assert found.of.max(initial=-1) < len(found.tokens)
    shared = [(tuple(whole[:length]), each) for (whole, _, each), length in zip(drawn, reach.tolist(), strict=True)]
    assert saved == most_saved([sequence for sequence in shared if len(sequence[0]) >= least], least)


def test_beginnings_of_beginnings():
    """Each longer by one than the one before, far more than calls of a function may be nested."""
    ids = Ragged.join([np.zeros(length, np.int32) for length in range(3000)])
    found = find_preambles(ids, ids.lengths, np.zeros(3000, np.int64), UNIT)
    assert [len(tokens) for tokens in found.tokens] == [1499]  # by 1501 sequences, twice: not saving less than 1500
    assert np.flatnonzero(found.of >= 0).tolist() == list(range(1499, 3000))


class Checked:
    """An engine that runs nothing and puts each unit's sequences together again."""

    def __init__(self, expected: Callable[[bool, int], TokenSequence], shared_length: int) -> None:
        self.facts = SimpleNamespace(batch_tokens=100, cache_tokens=400)
        self.expected, self.shared_length = expected, shared_length
        self.seen: Counter[tuple[bool, int]] = Counter()
        self.trees: list[Trees] = []

    def run(
        self, units: Iterable[tuple[int, Unit]], sequences: Sequences, advance: Callable[[int], None]
    ) -> Generator[Done]:
        for number, unit in units:
            trees = sequences.trees(unit)
            self.trees.append(trees)
            whole: list[TokenSequence] = []
            for own, parent in zip(trees.sequences, trees.parents.tolist(), strict=True):
                assert len(own.ids) > 0 and parent < len(whole)
                assert (own.rows >= 0).all(), "a row that is read lies in what is continued"
                before = whole[parent].ids if parent >= 0 else own.ids[:0]
                whole.append(TokenSequence(np.concatenate([before, own.ids]), own.rows + len(before), own.targets))
                assert parent < 0 or len(whole[-1].ids) <= self.shared_length
            preambles, roots, children, zero, one = unit.parts()
            passes = iter(whole[len(preambles) :])
            for root, scored in zip(roots.tolist(), unit.scored.tolist(), strict=True):
                sequence = next(passes)
                if scored:
                    self.check(False, root, sequence)
                else:
                    assert not len(sequence.rows)
            for one_shot, numbers in ((True, children), (False, zero), (True, one)):
                for each in numbers.tolist():
                    self.check(one_shot, each, next(passes))
            nothing = np.zeros(len(roots[unit.scored]) + len(zero), np.float32)
            results = np.concatenate([roots[unit.scored], zero]), nothing
            numbers = np.concatenate([children, one])
            forwarded = sum(len(own.ids) for own in trees.sequences)
            assert forwarded == sequences.passes.forwarded_tokens(unit)
            yield Done(number, UnitResult(results, (numbers, np.zeros(len(numbers), np.float32)), forwarded, 0), 0.0)

    def check(self, one_shot: bool, number: int, sequence: TokenSequence) -> None:
        """Its scored tokens stand behind the same tokens; a root may go on behind them."""
        expected = self.expected(one_shot, number)
        self.seen[one_shot, number] += 1
        assert_same(TokenSequence(sequence.ids[: len(expected.ids)], sequence.rows, sequence.targets), expected)


def run(
    data: list[dict[str, Any]], template: Template, neighbors: np.ndarray, limit: int | None, shared_length: int
) -> tuple[Job, Checked]:
    """All of a job but the model."""
    records = read_records(open_source(data))
    job = Job.start(records, template, limit, neighbors.shape[1])
    job.measure_zero_shot(Progress(False))
    index = np.where(job.pending()[:, None] & job.pending()[neighbors], neighbors, -1)
    job.neighbors = Neighbors(index, np.zeros(index.shape, np.float32))
    job.measure_one_shot(Progress(False), shared_length)

    def expected(one_shot: bool, number: int) -> TokenSequence:
        record, rank = divmod(number, neighbors.shape[1] if one_shot else 1)
        if one_shot:
            whole = template.one_shot(records[int(index[record, rank])], records[record])
        else:
            whole = template.zero_shot(records[record])
        return whole.cut(int(job.scored_tokens[record]))

    engine = Checked(expected, shared_length)
    job.run(engine, Progress(False), shared_length)
    scored = np.flatnonzero(job.pending()).tolist()
    passes = [*((False, i) for i in scored), *((True, i) for i in np.flatnonzero(job.one_length).tolist())]
    assert engine.seen == Counter(passes)
    return job, engine


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, Template]:
    rewriting = byte_level()
    rewriting.chat_template = REWRITING
    made = {name: load_template(name, byte_level(), include_eos=True) for name in ("alpaca", "plain", "chat")}
    # Where an instruction is empty, nothing but BOS stands before the response.
    bare = tmp_path_factory.mktemp("templates") / "bare.jinja"
    bare.write_text(
        "{% set separator = '' %}{% macro prompt(instruction, input) %}{{ instruction }}{{ input }}{% endmacro %}"
    )
    return made | {
        "rewriting": load_template("chat", rewriting),
        "bare": load_template(bare, byte_level(bos_and_eos=True)),
    }


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat", "rewriting", "bare"])
@settings(max_examples=25)
@given(
    data=st.lists(rows(), min_size=2, max_size=9),
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 3),
    limit=st.none() | st.integers(20, 300),
    shared_length=st.sampled_from([0, 60, 10**9]),
)
def test_every_sequence_is_its_own(templates, name, data, seed, k, limit, shared_length):
    """Whatever a unit shares: put together again, each pass is what the template writes, once."""
    generator = np.random.default_rng(seed)
    others = np.stack([generator.permutation(len(data) - 1) for _ in data])[:, :k]
    neighbors = np.where(others >= np.arange(len(data))[:, None], others + 1, others)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharing, "LEAST_SHARED", 2)
            run(data, templates[name], neighbors, limit, shared_length)
    except ValueError as error:
        assert "records" in str(error) or "readable" in str(error)


def chain(count: int) -> np.ndarray:
    """Each demonstrates with the next; the last with the first."""
    return ((np.arange(count) + 1) % count)[:, None]


@pytest.mark.parametrize("name", ["chat", "rewriting"])
def test_a_system_text_is_run_once_a_unit(templates, name):
    """By zero-shot passes and roots, and by whole one-shot passes where the template rewrites its history."""
    system = "Answer as a pirate would, in one line. " * 5
    data = [{"system": system, "instruction": f"{i} times {i}?", "output": "Aye."} for i in range(40)]
    _, engine = run(data, templates[name], chain(40), None, 10**9)
    assert len(engine.trees) > 1
    for trees in engine.trees:
        (first,) = np.flatnonzero(trees.parents < 0)
        assert system in templates[name].encoder.decode(trees.sequences[first].ids)


def test_children_share_what_they_go_on_with(templates):
    """Behind a demonstration the template's words stand once."""
    data = [{"instruction": text, "output": "x"} for text in ("a b c", "d e f", "g h i", "j k l")]
    _, engine = run(data, templates["alpaca"], np.array([[1], [0], [0], [0]]), None, 10**9)
    decode = templates["alpaca"].encoder.decode
    (trees,) = engine.trees
    written = "".join(decode(own.ids) for own in trees.sequences)
    assert written.count("Below is an instruction") == 1 + 1 + 1  # before all, and behind records 0 and 1


@pytest.mark.parametrize("name", ["chat", "rewriting"])
def test_what_begins_with_the_same_system_text_stands_together(templates, name):
    """Each of many is run once or twice, though there are far more units."""
    generator = np.random.default_rng(0)
    systems = [" ".join(generator.choice(["who", "what", "where", "why"], 30)) for _ in range(24)]
    data = [{"system": systems[i % 24], "instruction": f"{i} times {i}?", "output": "Aye."} for i in range(240)]
    neighbors = (np.arange(240) + 24) % 240
    _, engine = run(data, templates[name], neighbors[:, None], None, 10**9)
    decode = templates[name].encoder.decode
    written = ["".join(decode(own.ids) for own in trees.sequences) for trees in engine.trees]
    assert len(written) > 20
    assert max(sum(text.count(system) for text in written) for system in systems) <= LEAST_UNITS


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat", "rewriting", "bare"])
def test_what_predicts_the_first_token_of_a_response_is_not_shared(templates, name):
    """Though all that stands before the responses is the same: each pass reads the row that precedes its own."""
    data = [{"instruction": "Say it.", "output": "red"}] * 6
    colors = ("red", "blue", "three", "is", "the", "42")
    data += [{"instruction": "Say another color than that, " * 4, "output": color} for color in colors]
    each = np.arange(6)
    for neighbors in ([*each + 6, *each], [*(each + 1) % 6, *each], [6] + [0] * 11):
        run(data, templates[name], np.array(neighbors)[:, None], None, 10**9)


def test_a_response_that_goes_on_as_another_prompt_is_not_shared(templates):
    """One begins where the next still reads its prompt, and one right behind the demonstration."""
    data = [{"instruction": "42135"[:count], "output": "42135"[count:]} for count in (2, 4, 3, 1)]
    said = [("user", ""), ("assistant", "4"), ("user", "2"), ("assistant", "1")]
    data.append({"messages": [{"role": role, "content": text} for role, text in said]})
    for neighbors in ([1, 0, 0, 0, 0], [4, 0, 1, 2, 3], [3, 3, 3, 0, 3]):
        run(data, templates["bare"], np.array(neighbors)[:, None], None, 10**9)


def test_nothing_is_shared_that_is_not_worth_a_pass(templates):
    """`User: ` is common to all, and too short."""
    data = [{"instruction": f"{letter} what?", "output": "x"} for letter in "abcdefgh"]
    _, engine = run(data, templates["plain"], chain(8), None, 10**9)
    assert sum((trees.parents < 0).sum() for trees in engine.trees) == 8
