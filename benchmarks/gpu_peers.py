"""Other ways to the log-probabilities of target tokens, and the two bounds: a copy and a read of the same bytes.

A peer is called with a `Problem` and returns the log-probabilities of the chosen rows. Peers that are not installed, or
refuse a shape, are left out; none is timed under another's name.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    full: Tensor  # [B, L + 1, V], contiguous: the last row of each sequence predicts nothing
    logits: Tensor  # [B, L, V], a view of it
    targets: Tensor  # [B * L]
    rows: Tensor | None  # the chosen ones, or None for all

    @property
    def chosen_targets(self) -> Tensor:
        return self.targets if self.rows is None else self.targets[self.rows]

    @property
    def ignored(self) -> Tensor:
        """Targets with -100 where a row is not chosen, for peers that know no index."""
        if self.rows is None:
            return self.targets
        labels = torch.full_like(self.targets, -100)
        labels[self.rows] = self.targets[self.rows]
        return labels

    def by_sequence(self) -> tuple[Tensor, Tensor | None]:
        """Targets and which of them are chosen, None for all; int64 [B, L]."""
        shape = self.logits.shape[:2]
        return self.targets.view(shape), None if self.rows is None else (self.ignored != -100).view(shape).long()


Peer = Callable[[], Tensor]


def peers(problem: Problem) -> dict[str, Callable[[], Peer]]:
    """For each name, what makes the call that is timed; labels and masks are made beforehand."""
    vocab = problem.full.shape[-1]
    targets, rows = problem.chosen_targets, problem.rows

    def torch_float32() -> Peer:
        return lambda: log_softmax_gather(problem.logits, targets, rows)

    def torch_compile() -> Peer:
        function = compiled(vocab)
        return lambda: function(problem.logits, targets, rows)

    def liger() -> Peer:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        ids, mask = problem.by_sequence()
        return lambda: _pick(fused_selective_log_softmax(problem.full, ids, 1.0, mask).flatten(), rows)

    def flash_attn() -> Peer:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        labels = problem.ignored
        return lambda: _pick(-cross_entropy_loss(problem.logits.reshape(-1, vocab), labels)[0], rows)

    def quack() -> Peer:
        from quack.cross_entropy import cross_entropy

        labels = problem.ignored
        return lambda: _pick(-cross_entropy(problem.logits.reshape(-1, vocab), labels, reduction="none"), rows)

    def trl() -> Peer:
        from trl.trainer.utils import selective_log_softmax

        ids, mask = problem.by_sequence()
        masked = {} if mask is None else {"row_mask": mask}
        return lambda: _pick(selective_log_softmax(problem.logits, ids, **masked).flatten(), rows)

    return {
        "torch_float32": torch_float32,
        "torch_compile": torch_compile,
        "liger": liger,
        "flash_attn": flash_attn,
        "quack": quack,
        "trl": trl,
    }


def log_softmax_gather(logits: Tensor, targets: Tensor, rows: Tensor | None) -> Tensor:
    chosen = _pick(logits.reshape(-1, logits.shape[-1]), rows)
    return chosen.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


@lru_cache(maxsize=1)
def compiled(vocab: int) -> Callable[..., Tensor]:
    """One for each V, which is then a constant in it; the number of rows becomes dynamic by itself.

    Types, views and ways to choose rows need a graph each, ten in all. Beyond its limit torch would go on without
    compiling; here it raises, and where a version of torch cannot be told to, AttributeError does.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(log_softmax_gather)


def _pick(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def readers(source: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read all of a contiguous tensor and write next to nothing; the fastest is the bound."""
    words = source.view(-1).view(torch.int32)
    ways: dict[str, Callable[[], object]] = {
        "torch sum of float32": lambda: words.view(torch.float32).sum(),
        "torch maximum of float32": lambda: words.view(torch.float32).amax(),
    }
    with suppress(ImportError):
        ways["triton sum of int32"] = _triton_reader(words)
    return ways


def _triton_reader(words: Tensor) -> Callable[[], object]:
    from gpu_read import BLOCK, read

    blocks = -(-words.numel() // BLOCK)
    out = torch.empty(blocks, dtype=torch.int32, device=words.device)
    return lambda: read[(blocks,)](words, out, words.numel(), BLOCK, num_warps=8)
