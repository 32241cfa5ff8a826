"""Templates of strangers: kept from files and code by Jinja's sandbox, from data by slots, and small by limits."""

from __future__ import annotations

import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# Between noncharacters, which no text holds: a template is rendered around numbered slots, never around data.
SLOT = re.compile("\ufdd0([0-9]+)\ufdd1")

MAX_SOURCE_CHARACTERS = 1 << 20
MAX_RENDERED_CHARACTERS = 1 << 20
_MAX_BYTES = 512 << 20
_MAX_STEPS = 1_000_000
_MAX_SECONDS = 20.0
# The limit of memory is the process's: a second thread would take the first's for what was there before.
_ONE_AT_A_TIME = threading.RLock()
_FILE = "<template>"  # what Jinja calls the code of a template that came from no file


def slot(number: int) -> str:
    """What stands in a rendered template where a text from data will stand."""
    return f"\ufdd0{number}\ufdd1"


class _TooMuch(Exception):
    """A template went beyond what it may cost."""


@contextmanager
def limits(name: str) -> Iterator[None]:
    """Inside, templates are compiled and rendered; whatever they do wrong comes out as ValueError, naming the template.

    Limited are the lines run (loops, however nested), the seconds, and the memory that the process may add. One thread
    is inside at a time; its seconds begin there.
    """
    steps = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > _MAX_STEPS or time.monotonic() > end:
            raise _TooMuch(f"it takes more than {_MAX_STEPS:,} steps, or {_MAX_SECONDS:.0f} seconds")
        return step

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return step if frame.f_code.co_filename == _FILE else None

    before = sys.gettrace()
    with _ONE_AT_A_TIME, _little_memory():
        end = time.monotonic() + _MAX_SECONDS
        sys.settrace(enter)
        try:
            yield
        except MemoryError:
            raise ValueError(f"{name}: it takes more than {_MAX_BYTES >> 20} MiB of memory") from None
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}: {error.message} in line {error.lineno}") from error
        except Exception as error:  # whatever code that anybody wrote may raise
            raise ValueError(f"{name}: {error or type(error).__name__}") from error
        finally:
            sys.settrace(before)


class _Generation(jinja2.ext.Extension):
    """Hugging Face's tag around what the assistant says, for masks: to us nothing but what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - as in the class that it extends

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_source(name: str, source: str) -> None:
    """Raises ValueError for a source that is too long, or computes powers: one of those can take days."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise ValueError(f"{name}: its source has more than {MAX_SOURCE_CHARACTERS:,} characters")
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _Generation])
    with limits(name):
        try:
            tree = environment.parse(source)
        except jinja2.TemplateSyntaxError:  # a tag that only the tokenizer's own environment knows, or a mistake
            if "**" in source:
                raise
            return
        if tree.find(jinja2.nodes.Pow) is not None:
            raise ValueError("it computes a power (**), which no prompt needs")


def check_length(name: str, text: str) -> str:
    """The text; ValueError where it is too long for a prompt around its texts."""
    if len(text) > MAX_RENDERED_CHARACTERS:
        raise ValueError(f"{name}: it writes more than {MAX_RENDERED_CHARACTERS:,} characters around the texts")
    return text


@contextmanager
def _little_memory() -> Iterator[None]:
    """Lets the process add so much memory and no more; where the system does not say how much it has, any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with open("/proc/self/statm") as stream:
            held = int(stream.read().split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    allowed = held + _MAX_BYTES
    if soft != resource.RLIM_INFINITY and soft < allowed:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
