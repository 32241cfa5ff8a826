"""What gpu.py prints of its row cases."""

from __future__ import annotations

from gpu_cases import Case, scored


def table(cases: list[Case]) -> str:
    """All rows scored, contiguous, as ops would do it: what a README shows."""
    chosen = [
        case
        for case in cases
        if case.density == 1
        and case.view == "contiguous"
        and case.dtype == "bfloat16"
        and case.automatic
        and not (case.left_out or case.error)
    ]
    head = "| kernel | V | rows | µs | GB/s | of copy | of read | empty kernel, µs | fastest peer |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *map(line, chosen)])


def line(case: Case) -> str:
    """A case's figures, those of them that there are, and what is noted."""
    name = f"| {case.kernel} | {case.vocab} | {case.rows}"
    if case.density != 1 or case.view != "contiguous" or case.dtype != "bfloat16":
        name += f", {case.dtype}, density {case.density}, {case.view}"
    figures = [""] * 5
    if case.seconds:
        figures[:2] = f"{case.seconds * 1e6:.1f}", f"{case.bytes / case.seconds / 1e9:.0f}"
    if case.read_seconds:
        figures[2:] = f"{case.fraction_of_copy:.3f}", f"{case.fraction_of_read:.3f}", f"{case.launch_seconds * 1e6:.1f}"
    peers = sorted(case.peers.items(), key=lambda item: item[1])
    best = f"{peers[0][0]} {peers[0][1] / case.seconds:.2f}×" if peers else None
    said = [text for text in (best, case.left_out, case.error, case.note, case.peers_note) if text]
    return f"{name} | {' | '.join(figures)} | {'; '.join(said)} |"


def split_table(cases: list[Case]) -> str:
    """How much longer rows take whole than split, with a star where ops splits: where its threshold should lie."""
    ratios: dict[int, dict[int, str]] = {}
    whole = {shape(case): case for case in cases if case.kernel == "row"}
    for case in cases:
        other = whole.get(shape(case))
        if case.kernel == "split" and case.seconds and other and other.seconds:
            ratio = f"{other.seconds / case.seconds:.2f}{'*' if case.automatic else ''}"
            ratios.setdefault(scored(case.rows, case.density), {})[case.vocab] = ratio
    vocabs = sorted({vocab for of_rows in ratios.values() for vocab in of_rows})
    lines = [["whole over split: scored rows", *(f"V = {vocab}" for vocab in vocabs)], ["---"] * (len(vocabs) + 1)]
    lines += [[str(rows), *(ratios[rows].get(vocab, "") for vocab in vocabs)] for rows in sorted(ratios)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shape(case: Case) -> tuple[str, int, int, float, str]:
    return case.dtype, case.vocab, case.rows, case.density, case.view
