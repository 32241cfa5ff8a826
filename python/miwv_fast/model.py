"""A causal language model that gives the mean negative log-likelihood of responses and keeps what others continue."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from miwv_fast import ops
from miwv_fast.assembly import TokenSequence
from miwv_fast.head import Scored, agree, find_head, positions_at_a_time

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of sequences that others continue: per layer two tensors [R, heads, W, D]; `lengths` [R] <= W."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    lengths: np.ndarray

    @staticmethod
    def join(parts: Sequence[Prefixes]) -> Prefixes:
        """One after the other; each layer is copied once, its part's own copy freed as it goes."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.layers[0][0].shape[2] for part in parts)

        def stack(layer: int, which: int) -> torch.Tensor:
            tensors = [part.layers[layer][which] for part in parts]
            return torch.cat([functional.pad(tensor, (0, 0, 0, width - tensor.shape[2])) for tensor in tensors])

        layers = [(stack(layer, 0), stack(layer, 1)) for layer in range(len(parts[0].layers))]
        return Prefixes(layers, np.concatenate([part.lengths for part in parts]))

    def pick(self, rows: np.ndarray) -> Prefixes:
        """These rows, which may repeat, as wide as the longest of them; one row is expanded and not copied."""
        lengths = self.lengths[rows]
        width = int(lengths.max())
        index = torch.from_numpy(rows)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor[:, :, :width]
            if (rows == rows[0]).all():
                return tensor[int(rows[0])].expand(len(rows), *tensor.shape[1:])
            return tensor.index_select(0, index.to(tensor.device))

        return Prefixes([(take(keys), take(values)) for keys, values in self.layers], lengths)


class CausalLM:
    """A model, its tokenizer, how its losses at scored positions are had, and whether sequences can share a prefix.

    `max_length` is the number of positions the model knows, None where it has no limit. `head.name` is the way to the
    losses: `direct`, `rows` or `all`. `shared_length`: the longest sequence that can be run behind the kept keys and
    values of its beginning, 0 where none can.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.device = model.device
        config = model.config.get_text_config()
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
        self.head = find_head(self.model, name)
        self.cache_bytes_per_token = 0
        self.shared_length = self._check_sharing()

    def room(self) -> int:
        """Bytes of the GPU that the weights leave.

        Not what happens to be free: the plan, and with it the last bits of the scores, must not depend on what else the
        machine does.
        """
        weights: int = sum(parameter.nbytes for parameter in self.model.parameters())
        return int(torch.cuda.get_device_properties(self.device).total_memory) - weights

    def default_batch_tokens(self) -> int:
        """A token budget by what the weights leave of a GPU, or by the workspace where all logits are computed.

        On a CPU 1,024: time per token is flat from 256 to 8,192 (benchmarks/batch_tokens.py), and a budget measured
        anew at every start would change the last bits of the scores from run to run.
        """
        if self.device.type == "cuda":
            # What a layer holds of a token at once: some 16 vectors of the hidden size, a multiple of it in the MLP.
            held = 64 * int(self.model.config.get_text_config().hidden_size) * int(self.model.dtype.itemsize)
            budget = max(1024, min(32768, self.room() // 4 // held))
        else:
            budget = 1024
        return min(budget, positions_at_a_time(self.model)) if self.head.name == "all" else budget

    def describe(self) -> dict[str, Any]:
        """What was found out about the model: for bug reports, and for those who wonder which path it takes."""
        return {
            "name": self.name,
            "architecture": type(self.model).__name__,
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "vocabulary": self.vocab_size,
            "max_length": self.max_length,
            "head": self.head.name,
            "logit_scale": getattr(self.head, "scale", None),
            "logit_softcap": getattr(self.head, "softcap", None),
            "shares_prefixes": self.shared_length > 0,
            "batch_tokens": self.default_batch_tokens(),
        }

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of every weight as it is in memory, hexadecimal."""
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        # The configuration does not say which attention was chosen, and that changes the last bits.
        config["class"] = type(self.model).__name__
        config["attention"] = getattr(self.model.config, "_attn_implementation", None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def response_nll(self, sequences: Sequence[TokenSequence], prefixes: Prefixes | None = None) -> torch.Tensor:
        """Mean negative log-likelihood in nats, float32 [B] on the model's device, of each sequence's scored tokens.

        With `prefixes` [B], sequence b continues prefix b.
        """
        return self._run(sequences, prefixes, keep=False)[0]

    def response_nll_and_prefixes(self, sequences: Sequence[TokenSequence]) -> tuple[torch.Tensor, Prefixes]:
        """The same, and the sequences' own keys and values. A sequence without scored tokens has NaN."""
        nll, cache = self._run(sequences, None, keep=True)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        return nll, Prefixes(layers, np.array([len(sequence.ids) for sequence in sequences]))

    @torch.inference_mode()
    def token_nll(self, sequence: TokenSequence) -> torch.Tensor:
        """Negative log-likelihood in nats, float32 [T] on the model's device, of each scored token of a sequence."""
        ids = torch.from_numpy(sequence.ids).long()[None].to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        rows, targets = (torch.from_numpy(values).long() for values in (sequence.rows, sequence.targets))
        # To the head, every token is a response of its own.
        return self.head.response_nll(inputs, Scored(rows, targets, torch.arange(len(rows) + 1)))[0]

    @torch.inference_mode()
    def _run(
        self, sequences: Sequence[TokenSequence], prefixes: Prefixes | None, keep: bool
    ) -> tuple[torch.Tensor, Any]:
        width = max(len(sequence.ids) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        for place, sequence in enumerate(sequences):
            ids[place, : len(sequence.ids)] = torch.from_numpy(sequence.ids)
        rows = [place * width + sequence.rows.astype(np.int64) for place, sequence in enumerate(sequences)]
        targets = [sequence.targets.astype(np.int64) for sequence in sequences]
        offsets = np.cumsum([0, *(len(part) for part in targets)], dtype=np.int64)
        scored = Scored(
            *(torch.from_numpy(values) for values in (np.concatenate(rows), np.concatenate(targets), offsets))
        )
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": keep or prefixes is not None}
        # Padding stands behind what is scored, where a causal model does not look: without prefixes there is nothing to
        # mask, and transformers need not look at a mask either, which on a GPU would wait for it.
        if prefixes is not None:
            from transformers import DynamicCache

            lengths = torch.from_numpy(prefixes.lengths)[:, None]
            before = torch.arange(prefixes.layers[0][0].shape[2]) < lengths
            own = torch.arange(width) < torch.tensor([len(sequence.ids) for sequence in sequences])[:, None]
            inputs["attention_mask"] = torch.cat([before, own], dim=1).long().to(self.device)
            inputs["position_ids"] = (lengths + torch.arange(width)).to(self.device)
            inputs["past_key_values"] = DynamicCache(prefixes.layers)
        nll, cache = self.head.response_nll(inputs, scored)
        return nll, cache if keep else None

    @torch.inference_mode()
    def _check_sharing(self) -> int:
        """Runs a sequence whole and behind its own beginning, in a batch with another: both must agree.

        The cache must keep every key and value: a recurrent state cannot be padded, and a sliding window forgets.
        """
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        ids = np.arange(14, dtype=np.int32) % self.vocab_size
        none, last = np.empty(0, np.int32), np.array([6], np.int32)
        whole = [TokenSequence(ids[:7], last, last), TokenSequence(ids[7:], last, last)]
        try:
            cache = self._run([TokenSequence(ids[:5], none, none), TokenSequence(ids[7:10], none, none)], None, True)[1]
            if cache is None or not all(
                type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
            ):
                return 0
            prefixes = Prefixes([(layer.keys, layer.values) for layer in cache.layers], np.array([5, 3]))
            behind = self.response_nll([whole[0].behind(5), whole[1].behind(3)], prefixes)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            _log.debug("%s cannot share prefixes: %s", self.name, error)
            return 0
        # The losses are float32, their rounding is that of the model's type.
        if not agree(behind, self.response_nll(whole), self.model.dtype):
            return 0
        kept = sum(tensor.nbytes for layer in prefixes.layers for tensor in layer)
        self.cache_bytes_per_token = kept // prefixes.layers[0][0].shape[0] // prefixes.layers[0][0].shape[2]
        windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        return min([window - 1 for window in windows], default=sys.maxsize)


def load_model(
    model: str | Path | tuple[Any, Any],
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    device_map: str | None = None,
) -> CausalLM:
    """Loads a model by hub name, folder or GGUF file, or takes a loaded `(model, tokenizer)` pair as it is.

    `dtype` auto: float32 on a CPU, the checkpoint's type on a GPU. `device_map` (accelerate) spreads a model given by
    name over the GPUs that this process sees. Weights are read from safetensors or GGUF; code and pickles from a hub or
    folder are never run, but a pair can be loaded by whatever means. Raises FileNotFoundError for a missing file,
    ValueError for a model or tokenizer that cannot be loaded, with the reason.
    """
    target = choose_device(device)
    chosen = choose_dtype(dtype, target)
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"a loaded model is given as (model, tokenizer), got {len(model)} items")
        loaded, own_tokenizer = model
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        if device != "auto":
            loaded = loaded.to(target)
        if dtype != "auto":
            loaded = loaded.to(chosen)
        return CausalLM(loaded, tokenizer or own_tokenizer, getattr(loaded, "name_or_path", "") or "the model")
    if not isinstance(model, str | Path):
        raise TypeError(f"model should be a name, a path or a (model, tokenizer) pair, it is {type(model).__name__}")
    folder, extra = _locate(model)
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model, tokenizer)
    # Pickled weights can run code; whoever trusts theirs loads them and passes the pair.
    safe = extra or {"use_safetensors": True}
    if device_map is not None:
        loaded = _load(AutoModelForCausalLM, "model", folder, {**safe, "dtype": chosen, "device_map": device_map})
        return CausalLM(loaded, tokenizer, str(model))
    loaded = _load(AutoModelForCausalLM, "model", folder, {**safe, "dtype": chosen})
    return CausalLM(loaded.to(target), tokenizer, str(model))


def load_tokenizer(model: str | Path, tokenizer: Any = None) -> Any:
    """The tokenizer given, by name or as it is, otherwise the model's own. Raises as `load_model` does."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, "tokenizer", *_locate(model if tokenizer is None else tokenizer))


def choose_device(device: str) -> str:
    """`auto` is the GPU where there is one and the kernels were built for it, otherwise the CPU."""
    if device != "auto":
        try:
            kind = torch.device(device).type
        except RuntimeError:
            raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: no CUDA device is available")
        return device
    if not torch.cuda.is_available():
        return "cpu"
    if not ops.build_info()["cuda"]:
        _log.warning("a GPU is present but this build has no CUDA kernels: running on the CPU")
        return "cpu"
    return "cuda"


def choose_dtype(dtype: str | torch.dtype, device: str) -> Any:
    """What to load the weights as: a torch type, or "auto" for the checkpoint's own. ValueError for another name."""
    if dtype == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) and dtype in _DTYPES.values():
        return dtype
    if dtype in _DTYPES:
        return _DTYPES[str(dtype)]
    raise ValueError(f"unknown dtype {dtype!r}; use auto, {', '.join(_DTYPES)}")


def _locate(model: str | Path) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained`: a name or folder, and the GGUF file in it."""
    path = Path(model)
    if path.suffix.lower() != ".gguf":
        if not path.exists() and (path.is_absolute() or str(model).startswith(".") or str(model).count("/") > 1):
            raise FileNotFoundError(f"no such model folder: {model}")
        return str(model), {}
    if not path.is_file():
        raise FileNotFoundError(f"no such model file: {path}")
    return str(path.parent), {"gguf_file": path.name}


def _load(loader: Any, what: str, name: str, options: dict[str, Any]) -> Any:
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the {what} {name!r}: {reason[:300]}") from error
