"""Tokenizers of three kinds, tiny models of many architectures, texts, embeddings and scores: all made here."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from miwv_fast.scores import SCHEMA

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:\nName three colors.\n\n### Input:\nred and blue\n\n### Response:\n",
    "User: What is the capital of France?\nAssistant:\nThe capital of France is Paris.\n\n",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Grüße aus Köln, ça va très bien, 日本語のテキスト",
]


def _specials(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])


def _wrap(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **tokens)
    wrapped.chat_template = CHATML
    return wrapped


def byte_level(bos_and_eos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, in the manner of GPT-2; adds BOS and EOS to every text where asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _specials(tokenizer)
    if not bos_and_eos:
        return _wrap(tokenizer, eos_token="<|im_end|>")
    ids = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """BPE with byte fallback that puts a blank before every text, in the manner of Llama-2; adds BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=260, initial_alphabet=list(string.ascii_letters))
    )
    spec = json.loads(tokenizer.to_str())
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *spec["model"]["vocab"]]
    # SentencePiece writes a newline as a byte; a merge across it would hide the boundary that anchors rely on.
    pieces = [piece for piece in pieces if "\n" not in piece]
    spec["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if not any("\n" in side for side in pair)]
    spec["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    _specials(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "bos_and_eos": lambda: byte_level(bos_and_eos=True),
}


def tiny_model(kind: str, vocab_size: int, max_length: int = 1024, seed: int = 0, **more: Any) -> Any:
    """A model with random weights, large enough for its predictions to be far from uniform."""
    import transformers

    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    llama_like = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": max_length,
        "initializer_range": 0.3,
        "pad_token_id": None,
    }
    mamba = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3, "pad_token_id": None}
    falcon = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
    # Its last two layers attend to the keys of the first two.
    gemma3n = {
        "vocab_size_per_layer_input": vocab_size,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": max_length, "initializer_range": 0.3}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("LlamaConfig", llama_like),
        "qwen3": ("Qwen3Config", llama_like),
        "gemma2": ("Gemma2Config", llama_like),
        "gemma3": ("Gemma3TextConfig", {**llama_like, "final_logit_softcapping": 12.0}),
        "gemma3n": ("Gemma3nTextConfig", {**llama_like, **gemma3n}),
        "granite": ("GraniteConfig", {**llama_like, "logits_scaling": 8.0}),
        "cohere": ("CohereConfig", {**llama_like, "logit_scale": 0.25}),
        "gpt2": ("GPT2Config", gpt2),
        "phi": ("PhiConfig", llama_like),
        "phi3": ("Phi3Config", {**llama_like, "original_max_position_embeddings": 16}),
        "opt": ("OPTConfig", {**llama_like, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3}),
        "mistral": ("MistralConfig", llama_like),
        "falcon_h1": ("FalconH1Config", {**llama_like, **falcon, "lm_head_multiplier": 0.6}),
        "mamba": ("MambaConfig", mamba),
    }
    name, options = configs[kind]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**options, **common, **more)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def words(random_state: random.Random, count: int) -> str:
    """Text with blanks, newlines, digits, umlauts and emoji in it."""
    vocabulary = [
        "red",
        "blue",
        "Paris",
        "add",
        "three",
        "is",
        "the",
        "42",
        "Grüße",
        "日本",
        "\n",
        "a,b",
        "😀",
        "  x",
        ".",
    ]
    return " ".join(random_state.choice(vocabulary) for _ in range(count)).strip() or "red"


def text_embedder(texts: list[str]) -> np.ndarray:
    """Letter counts: similar for similar texts, the same on every machine."""
    counts = np.zeros((len(texts), 64), np.float32)
    for row, text in enumerate(texts):
        for letter in text:
            counts[row, ord(letter) % 64] += 1
    return counts


def random_scores(count: int, rejected: int = 0, seed: int = 0) -> pa.Table:
    """A table as scoring makes it, of losses drawn at random; the last `rejected` records have no score."""
    state = np.random.default_rng(seed)
    scored = np.arange(count) < count - rejected
    zero = state.gamma(3, 0.5, count).astype(np.float32)
    one = (zero * 0.9 + state.normal(0, 0.2, count)).astype(np.float32)

    def column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.array(values, kind, mask=~scored)

    return pa.table(
        {
            "index": np.arange(count),
            "id": pa.array([f"id-{number}" for number in range(count)]),
            "miwv": column(one - zero, pa.float32()),
            "nll_one_shot": column(one, pa.float32()),
            "nll_zero_shot": column(zero, pa.float32()),
            "response_tokens": column(state.integers(1, 900, count), pa.int32()),
            "neighbor": column((np.arange(count) + 1) % max(1, count - rejected), pa.int64()),
            "similarity": column(state.uniform(0.2, 1, count).astype(np.float32), pa.float32()),
            "status": pa.array(np.where(scored, "ok", "empty_response")),
        },
        schema=SCHEMA,
    )
