"""Progress bars: a line per stage with rate and time left, below it what is finished, silent when nobody watches."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from miwv_fast.terminal import is_terminal


class Advance(Protocol):
    """Called with the number of units of a stage that were finished, and with what to show below its bar."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Tally:
    """What is finished of a plan, in words, with the rates of the workers where there are several."""

    def __init__(self, units: int, records: int) -> None:
        self._units, self._records = units, records
        self._units_done = self._records_done = 0
        self._workers: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def add(self, records: int, tokens: int = 0, seconds: float = 0.0, worker: str = "") -> str:
        """Counts a unit with this many records and gives the words."""
        self._units_done += 1
        self._records_done += records
        if seconds > 0:
            of_worker = self._workers[worker]
            of_worker[0] += tokens
            of_worker[1] += seconds
        words = f"{self._units_done:,} of {self._units:,} units, {self._records_done:,} of {self._records:,} records"
        if len(self._workers) < 2:
            return words
        rates = [tokens / seconds for tokens, seconds in self._workers.values()]
        return f"{words}; {len(rates)} workers, {min(rates):,.0f} to {max(rates):,.0f} tokens/s each"


class Progress:
    """Shows a bar per stage on standard error; `auto` shows it on a terminal only."""

    def __init__(self, show: bool | Literal["auto"] = "auto") -> None:
        if show not in (True, False, "auto"):
            raise ValueError(f"progress should be True, False or 'auto', it is {show!r}")
        self._shown = is_terminal(sys.stderr) if show == "auto" else bool(show)

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Advance]:
        """A stage of `total` units; call what it yields with the number of units that were finished."""
        if not self._shown:
            yield lambda done, note="": None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class NotedBars(Bars):
            note = ""

            def get_renderables(self) -> Any:
                yield from super().get_renderables()
                if self.note:
                    yield Text(self.note, style="dim")

        bars = NotedBars(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            speed_estimate_period=300,  # units of many workers come in bursts
        )
        with bars:
            task = bars.add_task(name, total=total, rate="")

            def advance(done: int, note: str = "") -> None:
                bars.note = note or bars.note
                bars.advance(task, done)
                speed = bars.tasks[0].finished_speed or bars.tasks[0].speed
                bars.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")

            yield advance
