"""Ctrl-C and SIGTERM while a run is written: work at hand is finished where it is short, what is finished is kept."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

from miwv_fast.errors import Interrupted

P = ParamSpec("P")
R = TypeVar("R")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_log = logging.getLogger(__name__)


class _State:
    """Of this process, as signals are: whether one has come, and whether it has to wait."""

    came = False
    waiting = False


def stoppable(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises Interrupted where a signal stops it, if its argument `output` is not None.

    In `finishing` a signal waits; elsewhere it stops the function at once. A second one ends the process as ever.
    Threads other than the main one get no signals, and are not stopped.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("output") is None or threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        with _handlers():
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                raise Interrupted("stopped; what was finished is kept") from None

    return wrapped


@contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """Yields whether a signal has come, which it never has in threads that get none; until the end of the block it
    waits."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    if _State.came:  # it was lost on its way: to a callback, which cannot raise
        raise KeyboardInterrupt
    _State.waiting = True
    try:
        yield lambda: _State.came
    finally:
        _State.waiting = False


@contextmanager
def _handlers() -> Iterator[None]:
    # What is ignored stays so, as behind nohup; None is a handler that is not Python's, and could not be put back.
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    _State.came = False

    def note(number: int, frame: object) -> None:
        _State.came = True
        for each, handler in before.items():
            signal.signal(each, handler)
        if not _State.waiting:
            raise KeyboardInterrupt
        _log.warning("stopping when the unit at hand is finished; once more stops at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.came = False
