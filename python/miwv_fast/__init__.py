"""Score, rank and select instruction data by Model Instruction Weakness Value.

    scores = miwv_fast.score("alpaca.jsonl", model="HuggingFaceTB/SmolLM2-135M-Instruct")
    best = scores.select("1%")

Jiang et al., "Importance-Aware Data Selection for Efficient LLM Instruction Tuning", AAAI 2026, arXiv 2511.07074.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from miwv_fast import ops
from miwv_fast.errors import Interrupted

# Modules of the same names: bound here, or whoever imports the module first would hide the function.
from miwv_fast.explain import Explanation, explain
from miwv_fast.info import info

if TYPE_CHECKING:
    from miwv_fast.comparison import Comparison, compare
    from miwv_fast.saved import load_scores
    from miwv_fast.scorer import score
    from miwv_fast.scores import Scores

__all__ = [
    "Comparison",
    "Explanation",
    "Interrupted",
    "Scores",
    "compare",
    "explain",
    "info",
    "load_scores",
    "ops",
    "score",
]
__version__ = "0.1.0"

# Imported at first use: a tool that only wants `ops` pays for torch and nothing else.
_HOME = {
    "Comparison": "miwv_fast.comparison",
    "Scores": "miwv_fast.scores",
    "compare": "miwv_fast.comparison",
    "load_scores": "miwv_fast.saved",
    "score": "miwv_fast.scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'miwv_fast' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
