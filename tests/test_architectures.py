"""Every causal model of transformers that can be made small: its losses are its own, shared prefixes change none.

`python tests/test_architectures.py` says how many there are of each sort.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from miwv_fast.assembly import TokenSequence
from miwv_fast.model import CausalLM
from test_prefixes import VOCAB, sequence

# The names that configurations have for the same few things.
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "attention_hidden_size")
INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "hidden_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads", "encoder_attention_heads")
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(INNER, 64),
    **dict.fromkeys(LAYERS, 2),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_state"), 16),
    **{"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "state_size": 8},
    **{"vocab_size": VOCAB, "moe_intermediate_size": 32, "initializer_range": 0.3},
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
# Windows and what else chooses among keys, so narrow that the sequences below are longer.
NARROW: dict[str, Any] = {
    **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "attention_window", "block_size"), 20),
    **dict.fromkeys(("attention_window_size", "local_attention", "attention_chunk_size"), 20),
    **{"use_sliding_window": True, "max_window_layers": 0, "index_topk": 4, "index_topk_blocks": 2},
    **{"index_block_size": 4, "index_local_blocks": 1, "floor_scale": 8},
}
LARGEST = 30_000_000  # parameters
made: dict[str, bool] = {}  # what small_model() has said so far


def known(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some refuse to answer
        return False


# What some configurations want otherwise: heads whose width follows from others, as many key heads as heads, layers of
# several kinds, token numbers of their own.
OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
    dict.fromkeys(LAYERS, 4),
    {**dict.fromkeys(LAYERS, 8), "head_dim": None},
    {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
)


def small_model(kind: str) -> Any:
    """The first of its small forms that gives logits; skips where none does."""
    reason = ""
    for otherwise in OTHERWISE:
        try:
            model = _build(kind, SIZES | NARROW | otherwise)
            with torch.no_grad():
                model(torch.arange(6)[None])
            made[kind] = True
            return model
        except Exception as error:  # whatever a configuration or a model does not like
            reason = reason or str(error)
    made[kind] = False
    pytest.skip(f"cannot be made small: {reason}".splitlines()[0][:100])


def _build(kind: str, sizes: dict[str, Any]) -> Any:
    default = CONFIG_MAPPING[kind]()
    left_out = "head_dim" if sizes["head_dim"] is None else ""
    options = {name: value for name, value in sizes.items() if name != left_out and known(default, name)}
    config = type(default)(**options)
    layers = sizes["num_hidden_layers"]
    if known(config, "layer_types") and config.layer_types and len(config.layer_types) != layers:
        config = type(default)(**options, layer_types=list(config.layer_types)[:layers])
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert size <= LARGEST, f"{size:,} parameters"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_losses_are_those_of_the_model(kind: str) -> None:
    model = small_model(kind)
    whole = [sequence(60, 1, 20), sequence(42, 2, 12), sequence(52, 3, 14)]
    whole[2].ids[:38] = whole[0].ids[:38]
    try:
        lm = CausalLM(model, None, kind)
    except ValueError as error:
        # So small a Dory has layers that overwrite each other's cache.
        assert "sees the tokens that follow" in str(error) or (kind == "dory" and "without a cache" in str(error))
        return
    with torch.no_grad():
        logits = [model(torch.from_numpy(one.ids).long()[None]).logits[0].double() for one in whole]
    rows, targets = ([torch.from_numpy(getattr(one, name)).long() for one in whole] for name in ("rows", "targets"))
    expected = [-x.log_softmax(-1)[row, target].mean() for x, row, target in zip(logits, rows, targets, strict=True)]
    losses = lm.response_nll(whole)
    torch.testing.assert_close(losses, torch.stack(expected).float(), rtol=0, atol=5e-5)
    if not lm.shared_length:
        return
    kept, continued, scored = np.array([38, 25]), np.array([0, 1, 0]), np.array([21, 23], np.int32)
    beginnings = [TokenSequence(whole[i].ids[: kept[i]], scored, whole[i].ids[scored + 1]) for i in (0, 1)]
    behind = [one.behind(int(kept[i])) for one, i in zip(whole, continued, strict=True)]
    prefixes = lm.prefixes(kept, np.full(2, -1))
    lm.response_nll(beginnings, prefixes, keep=np.arange(2))
    torch.testing.assert_close(lm.response_nll(behind, prefixes, behind=continued), losses, rtol=0, atol=5e-5)
    # The same with beginnings that are themselves run behind 20 and 5 tokens: one pass more that rounds.
    halves = np.array([20, 5])
    prefixes = lm.prefixes(np.concatenate([halves, kept - halves]), np.array([-1, -1, 0, 1]))
    lm.response_nll([one.front(n) for one, n in zip(beginnings, halves, strict=True)], prefixes, keep=np.arange(2))
    rest = [one.behind(int(n)) for one, n in zip(beginnings, halves, strict=True)]
    own = lm.response_nll(rest, prefixes, keep=np.arange(2, 4))
    torch.testing.assert_close(own, lm.response_nll(beginnings), rtol=0, atol=5e-5)
    torch.testing.assert_close(lm.response_nll(behind, prefixes, behind=2 + continued), losses, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kind", "shares"), [("bart", False), ("mpt", False), ("gpt2", True), ("llama", True)])
def test_who_counts_positions_itself_does_not_share_in_16_bits(kind, shares):
    """Whose rounding would hide that the positions are wrong behind prefixes of different lengths."""
    model = small_model(kind)
    assert CausalLM(model, None, kind).shared_length == (0 if kind == "bart" else sys.maxsize)
    assert CausalLM(model.bfloat16(), None, kind).shared_length == (sys.maxsize if shares else 0)


@pytest.mark.skipif(transformers.__version__ != "5.24.0", reason="the count is that of transformers 5.24.0")
def test_most_can_be_made_small() -> None:
    """Without which the test above would skip them all and say nothing; models that it has made are not made again."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - made:
        with suppress(pytest.skip.Exception):
            small_model(kind)
    assert sum(made.values()) == 153


def main() -> None:
    """Counts what the test above sees."""
    counts: Counter[str] = Counter()
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            lm = CausalLM(small_model(kind), None, kind)
        except pytest.skip.Exception:
            counts["cannot be made small"] += 1
        except ValueError as error:
            counts["see later tokens" if "tokens that follow" in str(error) else "wrong without a cache"] += 1
        else:
            counts.update(
                {"causal": 1, f"of these: {lm.head.name}": 1, "of these: share prefixes": lm.shared_length > 0}
            )
    print(f"transformers {transformers.__version__}:", dict(counts))


if __name__ == "__main__":
    main()
