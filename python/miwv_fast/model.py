"""A causal language model that gives the mean negative log-likelihood of responses and keeps what others continue."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from miwv_fast.assembly import TokenSequence
from miwv_fast.devices import DTYPES, choose_device, choose_dtype, to_device
from miwv_fast.fields import shorten
from miwv_fast.fingerprint import hash_weights
from miwv_fast.head import Scored, positions_at_a_time, running
from miwv_fast.probe import agree, find_head
from miwv_fast.tokens import check_tokenizer

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from miwv_fast.prefixes import Prefixes

NO_TOKENIZER = object()  # for whom sequences come as tokens

_log = logging.getLogger(__name__)


class CausalLM:
    """A model, its tokenizer, how its losses at scored positions are had, and whether sequences can share a prefix.

    `max_length` is the number of positions the model knows, None where it has no limit. `head.name` is the way to the
    losses: `direct`, `rows` or `all`. `shared_length`: the longest sequence that can be run behind the kept keys and
    values of its beginning, 0 where none can; `cache_bytes_per_token` is what it takes to keep those of a token.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.device = model.device
        config = model.config.get_text_config()
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self._short = _short_length(config)
        self.vocab_size = int(config.vocab_size)
        self.shared_length = self.cache_bytes_per_token = self._cache_layers = 0
        self._cache_name = ""
        with running(self.model):
            self.head = find_head(self.model, name)
            self._check_sharing()

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
        return hash_weights(json.dumps(config, sort_keys=True, default=str), self.model)

    def response_nll(
        self,
        sequences: Sequence[TokenSequence],
        prefixes: Prefixes | None = None,
        *,
        keep: np.ndarray | None = None,
        behind: np.ndarray | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats, float32 [B] on the model's device, of each sequence's scored tokens.

        A sequence without scored tokens has NaN. With `prefixes`, sequence b continues prefix `behind[b]`, or becomes
        prefix `keep[b]`, behind the one that this continues if there is one.
        """
        if prefixes is not None and keep is not None:
            return self._run(sequences, prefixes.keep(keep), prefixes.before(keep))
        if prefixes is not None and behind is not None:
            return self._run(sequences, prefixes.behind(behind), prefixes.lengths[behind])
        long = [len(sequence.ids) > self._short for sequence in sequences]
        if any(long) and not all(long):
            nll: dict[int, torch.Tensor] = {}
            for kind in (True, False):
                places = [place for place, is_long in enumerate(long) if is_long == kind]
                nll |= zip(places, self._run([sequences[place] for place in places]), strict=True)
            return torch.stack([nll[place] for place in range(len(sequences))])
        return self._run(sequences)

    def prefixes(self, own: np.ndarray, parents: np.ndarray) -> Prefixes:
        """Room for the keys and values of sequences, which are run next: `own` int64 [R] are their lengths behind those
        that they continue, `parents` int64 [R], -1 where there is none."""
        from miwv_fast.prefixes import Prefixes

        return Prefixes(own, parents, self._cache_layers)

    @torch.inference_mode()
    def token_nll(self, sequence: TokenSequence) -> torch.Tensor:
        """Negative log-likelihood in nats, float32 [T] on the model's device, of each scored token of a sequence.

        Raises ValueError for a token that the model does not know.
        """
        if sequence.ids.max() >= self.vocab_size:
            raise ValueError(f"token {sequence.ids.max()} is none of the {self.vocab_size} that {self.name} knows")
        ids = torch.from_numpy(sequence.ids).long()[None].to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        rows, targets = (torch.from_numpy(values).long() for values in (sequence.rows, sequence.targets))
        # To the head, every token is a response of its own.
        with running(self.model):
            return self.head.response_nll(inputs, Scored(rows, targets, torch.arange(len(rows) + 1)))

    @torch.inference_mode()
    def _run(
        self, sequences: Sequence[TokenSequence], cache: Cache | None = None, before: np.ndarray | None = None
    ) -> torch.Tensor:
        """One forward pass, with `before` [B] tokens of each sequence in the cache, if any. Nothing in it waits for a
        GPU."""
        from miwv_fast.prefixes import pass_through

        width = max(len(sequence.ids) for sequence in sequences)
        ids = np.zeros((len(sequences), width), np.int64)
        for place, sequence in enumerate(sequences):
            ids[place, : len(sequence.ids)] = sequence.ids
        rows = [place * width + sequence.rows.astype(np.int64) for place, sequence in enumerate(sequences)]
        targets = [sequence.targets.astype(np.int64) for sequence in sequences]
        offsets = np.cumsum([0, *(len(part) for part in targets)], dtype=np.int64)
        scored = Scored(
            *(torch.from_numpy(values) for values in (np.concatenate(rows), np.concatenate(targets), offsets))
        )
        if cache is None and self._cache_layers:
            cache = pass_through(self._cache_layers)
        inputs: dict[str, Any] = {
            "input_ids": to_device(torch.from_numpy(ids), self.device),
            "use_cache": cache is not None,
        }
        if cache is not None:
            inputs[self._cache_name] = cache
        # Padding stands behind what is scored, where a causal model does not look: without prefixes there is nothing to
        # mask.
        if before is not None:
            lengths = torch.from_numpy(before)[:, None]
            kept = torch.arange(-int(before.max()), 0) >= -lengths
            own = torch.tensor([len(sequence.ids) for sequence in sequences])[:, None]
            position = torch.arange(width)
            inputs["attention_mask"] = to_device(torch.cat([kept, position < own], dim=1).long(), self.device)
            # Padding behind a long prefix would stand where the model knows no position.
            inputs["position_ids"] = to_device(lengths + torch.minimum(position, own - 1), self.device)
        with running(self.model):
            return self.head.response_nll(inputs, scored)

    @torch.inference_mode()
    def _check_sharing(self) -> None:
        """Runs a sequence whole and behind its own beginning, in a batch with another: both must agree.

        The model's own cache must be of keys and values, of which a window may be kept: a recurrent state cannot be
        padded. In 16 bits rounding would hide that a model counts positions itself, by what its cache holds.
        """
        from transformers import cache_utils

        ids = np.arange(14, dtype=np.int32) % self.vocab_size
        last = np.array([6], np.int32)
        whole = [TokenSequence(ids[:7], last, last), TokenSequence(ids[7:], last, last)]
        first, second = np.arange(2), np.array([2, 3])
        try:
            if self.model.dtype.itemsize < 4 and not self._heeds_positions(ids):
                return
            expected = self.response_nll(whole)
            output = self.model(torch.from_numpy(ids)[None].long().to(self.device), use_cache=True)
            # What a model gives out it takes by the same name; transformers renamed it in 5.24.
            self._cache_name = "cache" if "cache" in output else "past_key_values"
            own = output[self._cache_name]
            # A layer of the last kind attends to the keys of another.
            kinds = ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
            if any(type(layer) not in [getattr(cache_utils, kind, None) for kind in kinds] for layer in own.layers):
                return
            self._cache_layers = len(own.layers)
            prefixes = self.prefixes(np.array([3, 1, 2, 2]), np.array([-1, -1, 0, 1]))
            self.response_nll([whole[0].front(3), whole[1].front(1)], prefixes, keep=first)
            beginnings = [whole[0].front(5).behind(3), whole[1].front(3).behind(1)]
            self.response_nll(beginnings, prefixes, keep=second)
            behind = self.response_nll([whole[0].behind(5), whole[1].behind(3)], prefixes, behind=second)
            agreed = agree(torch.stack([behind, self.response_nll(whole)]), expected.expand(2, 2), self.model.dtype)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            _log.debug("%s cannot share prefixes: %s", self.name, error)
            agreed = False
        # The losses are float32, their rounding is that of the model's type.
        if not agreed:
            self._cache_layers = 0
            return
        self.cache_bytes_per_token = prefixes.bytes_per_token()
        self.shared_length = self._short

    def _heeds_positions(self, ids: np.ndarray) -> bool:
        """Whether other `position_ids` give other logits, to the bit."""
        tokens = to_device(torch.from_numpy(ids)[None].long(), self.device)
        places = torch.arange(len(ids), device=self.device)[None]
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        one, other = (self.model(**inputs, position_ids=given).logits for given in (places, places.flip(1)))
        return not torch.equal(one, other)


def _short_length(config: Any) -> int:
    """Up to which length LongRoPE has its short frequencies, the most there is for models without it.

    One position beyond gives the long ones to every position of a forward pass, so that no sequence may run beside, or
    behind, one of the other kind. (Dynamic scaling begins beyond what `max_length` allows.)
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = (rope, *(value for value in rope.values() if isinstance(value, dict)))
    lengths = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(lengths, default=sys.maxsize)


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
        asked = ("config", "device", "dtype", "get_output_embeddings")  # wrappers that pass these on will do
        if not isinstance(loaded, torch.nn.Module) or not all(hasattr(loaded, name) for name in asked):
            raise TypeError(
                "a loaded model is given as (model, tokenizer), the first is no model of transformers: "
                f"{type(loaded).__name__}"
            )
        tokenizer = load_tokenizer(own_tokenizer, tokenizer)
        if device != "auto":
            loaded = loaded.to(target)
        if dtype != "auto":
            loaded = loaded.to(chosen)
        choose_device(str(loaded.device))  # which may be one without kernels
        if loaded.dtype not in DTYPES.values():
            raise ValueError(
                f"the model is in {loaded.dtype}; scores are computed in {', '.join(DTYPES)}: give one of them as dtype"
            )
        return CausalLM(loaded, tokenizer, getattr(loaded, "name_or_path", "") or "the model")
    if not isinstance(model, str | Path):
        raise TypeError(f"model should be a name, a path or a (model, tokenizer) pair, it is {type(model).__name__}")
    folder, extra = _locate(model)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        tokenizer = load_tokenizer(model, tokenizer)
    except ValueError:
        if tokenizer is None and not extra:
            _load(AutoConfig, "model", folder, {})  # what is no model is not to be blamed on its tokenizer
        raise
    # Pickled weights can run code; whoever trusts theirs loads them and passes the pair.
    safe = extra or {"use_safetensors": True}
    loaded = _load(AutoModelForCausalLM, "model", folder, {**safe, "dtype": chosen, "device_map": device_map})
    if device_map is None:
        loaded = loaded.to(target)
    choose_device(str(loaded.device))
    return CausalLM(loaded, tokenizer, str(model))


def load_tokenizer(own: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, otherwise a model's own, which goes by the model's name; loaded where it is a name.

    Raises as `load_model` does, and TypeError for what is no tokenizer of transformers.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    chosen = own if tokenizer is None else tokenizer
    if chosen is NO_TOKENIZER:
        return chosen
    if isinstance(chosen, str | Path):
        folder, extra = _locate(chosen)
        # Of some kinds an empty one would be made.
        files = ("*token*", "*vocab*", "*.model", "tekken.json")
        if Path(folder).is_dir() and not extra and not any(any(Path(folder).glob(name)) for name in files):
            raise ValueError(
                f"cannot load the tokenizer {folder!r}: there is none in this folder; give one as tokenizer "
                "(--tokenizer), such as the name of the model that it was trained from"
            )
        chosen = _load(AutoTokenizer, "tokenizer", folder, extra)
    elif not isinstance(chosen, PreTrainedTokenizerBase):
        raise TypeError(f"a tokenizer is one of transformers, or its name or folder, this is {chosen!r:.80}")
    check_tokenizer(chosen)
    return chosen


def _locate(model: str | Path) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained`: a name or folder, and the GGUF file in it."""
    if not str(model):
        raise ValueError("a model or tokenizer has the empty text for its name")
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
    except Exception as error:  # what damaged weights and configurations raise is nowhere listed
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load the {what} {name!r}: {shorten(reason, 600)}") from error
