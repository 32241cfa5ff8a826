"""Ranking by MIWV and what a selection size means."""

from __future__ import annotations

import math
import numbers

import numpy as np


def rank(miwv: np.ndarray) -> np.ndarray:
    """Record numbers int64 [N], highest MIWV first; ties by the lowest number, NaN (not scored) last."""
    return np.argsort(np.where(np.isnan(miwv), np.inf, -miwv), kind="stable")


def selection_size(top: str | float | int, records: int) -> int:
    """How many of `records` a selection asks for: "1%" or a float in (0, 1] is a share, an int >= 1 a count.

    A share is rounded down, to at least one. Raises ValueError or TypeError for anything else, and for a count
    larger than the data.
    """
    hint = "use a share such as '1%' or 0.01, or a whole number of records"
    if isinstance(top, str):
        text = top.strip()
        try:
            top = _percent(text) if text.endswith("%") else int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            raise ValueError(f"cannot select top {text!r}; {hint}") from None
    if isinstance(top, bool) or not isinstance(top, numbers.Real):
        raise TypeError(f"cannot select top {top!r}; {hint}")
    if isinstance(top, numbers.Integral):
        if top < 1:
            raise ValueError(f"cannot select top {top}: the number of records is at least 1")
        if top > records:
            raise ValueError(f"cannot select {top} of {records} records")
        return int(top)
    if not 0 < top <= 1:
        raise ValueError(f"cannot select top {top}: a share lies in (0, 1]; {hint}")
    # A share of 0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996.
    return max(1, math.floor(float(top) * records * (1 + 1e-12)))


def _percent(text: str) -> float:
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError(text)
    return share
