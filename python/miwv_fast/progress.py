"""Progress bars: one line per stage with rate and time left, silent when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal


class Progress:
    """Shows a bar per stage on standard error; `auto` shows it on a terminal only."""

    def __init__(self, show: bool | Literal["auto"] = "auto") -> None:
        if show not in (True, False, "auto"):
            raise ValueError(f"progress should be True, False or 'auto', it is {show!r}")
        self._shown = sys.stderr.isatty() if show == "auto" else bool(show)

    @contextmanager
    def task(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A stage of `total` units; call what it yields with the number of units that were finished."""
        if not self._shown:
            yield lambda done: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        with bars:
            task = bars.add_task(name, total=total, rate="")

            def advance(done: int) -> None:
                bars.advance(task, done)
                speed = bars.tasks[0].finished_speed or bars.tasks[0].speed
                bars.update(task, rate=f"{speed:,.0f} {unit}/s" if speed else "")

            yield advance
