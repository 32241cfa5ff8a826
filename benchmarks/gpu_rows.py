"""The row kernels in two passes: ours and the bounds of all cases first, then the peers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_cases import DTYPES, Case, Timer, check_logprobs, gpu_is_lost, grid, measure, problem_of
from gpu_peers import Problem, peers
from gpu_run import Run, each
from gpu_tables import line


def time_rows(run: Run) -> None:
    """Ours, a copy, a read and an empty kernel."""
    device = torch.device("cuda", 0)
    cases = run.report["cases"] = list(grid(tuple(run.arguments.vocabs), tuple(run.arguments.rows)))
    timer, problem, bounds = Timer(device), inputs(cases, device), {}
    each(run, cases, lambda case: measure(case, problem(case), timer, bounds), line)


def time_peers(run: Run) -> None:
    """The peers of what was timed, once for each shape, one vocabulary after the other: some compile for each."""
    device, cases = torch.device("cuda", 0), run.report["cases"]
    timer, problem = Timer(device), inputs(cases, device)
    timed = [case for case in cases if case.seconds and case.automatic and case.kernel != "difference"]
    timed.sort(key=lambda case: run.arguments.vocabs.index(case.vocab))
    measure_case = lambda case: measure_peers(case, problem(case), timer)  # noqa: E731
    each(run, timed, measure_case, line, left_out="peers_note", wrong="peers_note")


def inputs(cases: list[Case], device: torch.device) -> Callable[[Case], Problem]:
    """What makes the inputs of a case, always the same: from one storage, filled anew where V or type change."""
    held: dict[tuple[str, int], torch.Tensor] = {}

    def problem(case: Case) -> Problem:
        group = case.dtype, case.vocab
        if group not in held:
            held.clear()
            torch.cuda.empty_cache()
            most = max(other.rows for other in cases if (other.dtype, other.vocab) == group)
            storage = torch.empty((most + 4) * case.vocab, dtype=DTYPES[case.dtype], device=device)
            held[group] = storage.normal_(0, 3, generator=torch.Generator(device).manual_seed(0))
        return problem_of(case, held[group])

    return problem


def measure_peers(case: Case, problem: Problem, timer: Timer) -> None:
    """Fills in what is said of peers, and nothing else."""
    for name, make in peers(problem).items():
        try:
            call = make()
            check_logprobs(call(), problem, 0.2)  # some of them answer in bfloat16
            case.peers[name] = timer(call, 0.1)
        except Exception as error:  # whatever a peer raises for a shape, or because it is not there
            case.peers_left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if gpu_is_lost():
                raise RuntimeError(f"{name} has left the GPU unusable") from error
        torch.cuda.empty_cache()
