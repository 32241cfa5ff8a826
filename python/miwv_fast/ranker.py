"""Ranking by MIWV, and which of the ranked records a selection takes."""

from __future__ import annotations

import logging
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# Cosines this close are equal: rounding must not make a copy of a record look different from it.
_ROUNDING = 1e-6
_HINT = "use a share such as '1%' or 0.01, or a whole number of records"
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 16384  # a block of similarities has 64 MiB

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Duplicates:
    """Records that were left out, best first, each for a better one that it is too similar to.

    `records` and `kept` int64 [M]: record `records[m]` stands back behind `kept[m]`, the most similar of those that
    were kept before it; `similarity` float32 [M], their cosine.
    """

    records: np.ndarray
    kept: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @staticmethod
    def none() -> Duplicates:
        """Nothing was left out."""
        return Duplicates(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class Selection:
    """The numbers of the selected records, int64 [K], best first; and those left out as near-duplicates."""

    records: np.ndarray
    duplicates: Duplicates


def rank(miwv: np.ndarray) -> np.ndarray:
    """Record numbers int64 [N], highest MIWV first; ties by the lowest number, NaN (not scored) last."""
    return np.argsort(np.where(np.isnan(miwv), np.inf, -miwv), kind="stable")


def selection_size(top: str | float | int, records: int) -> int:
    """How many of `records` a selection asks for: "1%" or a float in (0, 1] is a share, an int >= 1 a count.

    A share is rounded down, to at least one. Raises ValueError or TypeError for anything else, and for a count
    larger than the data.

    >>> selection_size("1%", 52002), selection_size(0.05, 52002), selection_size(500, 52002)
    (520, 2600, 500)
    """
    if isinstance(top, str):
        text = top.strip()
        try:
            top = _percent(text) if text.endswith("%") else int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            raise ValueError(f"cannot select top {text!r}; {_HINT}") from None
    if isinstance(top, bool) or not isinstance(top, numbers.Real):
        raise TypeError(f"cannot select top {top!r}; {_HINT}")
    if isinstance(top, numbers.Integral):
        if top < 1:
            raise ValueError(f"cannot select top {top}: the number of records is at least 1")
        if top > records:
            raise ValueError(f"cannot select {top} of {records} records")
        return int(top)
    if not 0 < top <= 1:
        raise ValueError(f"cannot select top {top}: a share lies in (0, 1]; {_HINT}")
    # A share of 0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996.
    return max(1, math.floor(float(top) * records * (1 + 1e-12)))


def _percent(text: str) -> float:
    share = float(text[:-1]) / 100
    if not 0 < share <= 1:
        raise ValueError(text)
    return share


def select(
    miwv: np.ndarray,
    response_tokens: np.ndarray,
    top: str | float | int | None = None,
    *,
    min_miwv: float | None = None,
    min_response_tokens: int | None = None,
    embeddings: np.ndarray | None = None,
    dedup: float | None = None,
    groups: np.ndarray | None = None,
) -> Selection:
    """The records that meet all conditions, best first, as many as `top` asks for; without `top` all of them.

    `miwv` float [N], NaN where not scored; `response_tokens` int [N]; `embeddings` float32 [N, D] for `dedup`, the
    cosine from which a record stands back behind a better one; `groups` int64 [N], a group's number for each record:
    each group gets its share of the scored records (`proportional`, `fill_quotas`). Warns where fewer are left than
    asked for. Raises ValueError where no record is scored, for conditions that none meets, or that make no sense.
    """
    if top is None and min_miwv is None:
        raise ValueError(f"nothing says how many records to select: {_HINT}, or give min_miwv")
    if top is None and groups is not None:
        raise ValueError("quotas divide a number of records, which min_miwv alone does not give: give top as well")
    scored = rank(miwv)[: int((~np.isnan(miwv)).sum())]
    if not len(scored):
        raise ValueError("no record has a score; the column status says why")
    asked = None if top is None else selection_size(top, len(miwv))
    order = scored
    for name, values, least in (
        ("min_miwv", miwv, min_miwv),
        ("min_response_tokens", response_tokens, min_response_tokens),
    ):
        if least is not None:
            order = _at_least(order, name, values, least)
    wanted = len(order) if asked is None else asked
    duplicates = Duplicates.none()
    if dedup is not None:
        if embeddings is None:
            raise ValueError("dedup needs the embeddings that the records were scored with, and there are none")
        # With quotas it is not known beforehand how far down the ranking they reach.
        order, duplicates = drop_near_duplicates(order, embeddings, dedup, wanted if groups is None else len(order))
    if asked is not None and asked > len(order):
        few = "have a score" if len(order) == len(scored) else "have a score and meet the conditions"
        _log.warning("%d records were asked for, only %d %s: selecting those", asked, len(order), few)
    if groups is None:
        return Selection(order[:wanted], duplicates)
    quotas = proportional(np.bincount(groups[scored], minlength=int(groups.max()) + 1).tolist(), wanted)
    return Selection(fill_quotas(order, groups, quotas, wanted), duplicates)


def _at_least(order: np.ndarray, name: str, values: np.ndarray, least: float) -> np.ndarray:
    whole = np.issubdtype(values.dtype, np.integer)
    if isinstance(least, bool) or not isinstance(least, numbers.Integral if whole else numbers.Real):
        raise TypeError(f"{name} should be a {'whole ' * whole}number, it is {least!r}")
    if math.isnan(least) or (whole and least < 0):
        raise ValueError(f"{name} should be {'at least 0' if whole else 'a number'}, it is {least}")
    if not whole:  # in the scores' own type: 0.7 is at least 0.7
        with np.errstate(over="ignore"):
            least = float(np.float32(least))
    chosen = values[order] >= least
    if not chosen.any():
        raise ValueError(f"no record is left by {name} {least:.6g}: the highest is {values[order].max():.6g}")
    return order[chosen]


def drop_near_duplicates(
    order: np.ndarray, embeddings: np.ndarray, threshold: float, wanted: int
) -> tuple[np.ndarray, Duplicates]:
    """Goes through `order` and keeps a record unless its cosine with one that was kept is `threshold` or more.

    `order` int64 [K] are rows of `embeddings` float32 [N, D], which may be mapped from a file. Stops when `wanted`
    records are kept. Returns those kept, in the same order, and those left out. An embedding that is zero or not finite
    resembles none. Time grows with K times the records that are kept; memory is a copy of their embeddings and 64 MiB.
    Raises ValueError unless the threshold lies in (0, 1].
    """
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
        raise TypeError(f"dedup should be a number, it is {threshold!r}")
    if not 0 < threshold <= 1:
        raise ValueError(f"dedup {threshold}: the cosine from which records are near-duplicates lies in (0, 1]")
    limit = threshold - _ROUNDING
    kept = np.empty(min(wanted, len(order)), np.int64)
    units = torch.empty(len(kept), embeddings.shape[1])
    count = 0
    dropped: list[tuple[int, int, float]] = []
    for begin in range(0, len(order), _BLOCK_ROWS):
        block = order[begin : begin + _BLOCK_ROWS]
        rows = _unit(embeddings[block])
        before, similarity = _most_similar(rows, units[:count])
        inside = (rows @ rows.T).numpy()
        here, first = np.empty(len(block), np.int64), count  # places in the block of those that are kept
        for place, record in enumerate(block.tolist()):
            if count == len(kept):
                break
            best, other = float(similarity[place]), int(before[place])
            if count > first:
                near = inside[place, here[: count - first]]
                nearest = int(near.argmax())
                if near[nearest] > best:
                    best, other = float(near[nearest]), first + nearest
            if best >= limit:
                dropped.append((record, int(kept[other]), min(best, 1.0)))
                continue
            here[count - first] = place
            kept[count] = record
            count += 1
        units[first:count] = rows[torch.from_numpy(here[: count - first])]
        if count == len(kept):
            break
    if not dropped:
        return kept[:count], Duplicates.none()
    records, better, cosines = zip(*dropped, strict=True)
    return kept[:count], Duplicates(
        np.array(records, np.int64), np.array(better, np.int64), np.array(cosines, np.float32)
    )


def _unit(rows: np.ndarray) -> torch.Tensor:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    usable = np.isfinite(norms) & (norms > 0)
    unit = np.zeros(rows.shape, np.float32)
    return torch.from_numpy(np.divide(rows, norms, out=unit, where=usable, casting="unsafe"))


def _most_similar(rows: torch.Tensor, others: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each row the place of the most similar of the others, and the cosine; -2 where there is none."""
    place, best = torch.full((len(rows),), -1), torch.full((len(rows),), -2.0)
    for begin in range(0, len(others), _BLOCK_COLUMNS):
        similarity, nearest = (rows @ others[begin : begin + _BLOCK_COLUMNS].T).max(dim=1)
        nearer = similarity > best
        best = torch.where(nearer, similarity, best)
        place = torch.where(nearer, nearest + begin, place)
    return place.numpy(), best.numpy()


def proportional(counts: Sequence[int], wanted: int) -> list[int]:
    """`wanted` places shared out in proportion to `counts`, by largest remainder.

    Each gets its exact share rounded down; the places left go one each to the largest fractions, ties to the first.

    >>> proportional([700, 200, 100], 12)  # 8.4, 2.4 and 1.2
    [9, 2, 1]
    """
    total = sum(counts)
    shares = [wanted * count // total for count in counts]
    by_fraction = sorted(range(len(counts)), key=lambda group: -(wanted * counts[group] % total))
    for group in by_fraction[: wanted - sum(shares)]:
        shares[group] += 1
    return shares


def fill_quotas(order: np.ndarray, groups: np.ndarray, quotas: Sequence[int], wanted: int) -> np.ndarray:
    """The best of each group up to its quota, in the order of `order`; `groups` int64 [N] is the group of each record.

    Places that a group cannot fill go to the best of the records that are left, whatever their group.
    """
    group = groups[order]
    by_group = np.argsort(group, kind="stable")
    start = np.searchsorted(group[by_group], np.arange(len(quotas)))
    place = np.empty(len(order), np.int64)  # within its group
    place[by_group] = np.arange(len(order)) - start[group[by_group]]
    chosen = place < np.asarray(quotas, np.int64)[group]
    chosen[np.flatnonzero(~chosen)[: max(0, wanted - int(chosen.sum()))]] = True
    selected: np.ndarray = order[chosen]
    return selected
