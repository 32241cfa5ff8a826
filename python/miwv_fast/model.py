"""A causal language model that gives the mean negative log-likelihood of responses, from response rows only."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miwv_fast import ops
from miwv_fast.templates import TokenSequence

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CausalLM:
    """A model, its tokenizer, and how its logits at scored positions are had.

    `max_length` is the number of positions the model knows, None where it has no limit.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.device = model.device
        config = model.config.get_text_config()
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        self.vocab_size = int(config.vocab_size)
        self.keeps_rows = self._check_rows()
        if not self.keeps_rows:
            _log.warning("%s cannot give logits at chosen positions only: all of them are computed", name)

    @torch.inference_mode()
    def response_nll(self, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Mean negative log-likelihood in nats, float32 [B], of the scored tokens of each sequence, in one pass."""
        width = max(len(sequence.ids) for sequence in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        keep = torch.zeros(len(sequences), width, dtype=torch.bool)
        for place, sequence in enumerate(sequences):
            length = len(sequence.ids)
            ids[place, :length] = torch.from_numpy(sequence.ids)
            mask[place, :length] = 1
            keep[place, torch.from_numpy(sequence.rows).long()] = True
        targets = torch.from_numpy(np.concatenate([sequence.targets for sequence in sequences])).long()
        counts = [len(sequence.targets) for sequence in sequences]
        offsets = torch.from_numpy(np.cumsum([0, *counts], dtype=np.int64))
        logits = self._forward(ids.to(self.device), mask.to(self.device), keep.to(self.device))
        rows = None if logits.ndim == 2 else keep.flatten().nonzero().squeeze(1).to(logits.device)
        nll = ops.response_nll(logits, targets.to(logits.device), offsets.to(logits.device), rows)
        return nll.cpu().numpy()

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits of the kept positions [T, V], or of all positions [B, S, V]."""
        chosen = {"logits_to_keep": keep} if self.keeps_rows else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **chosen).logits
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"{self.name} gives no logits; it is no causal language model")
        return logits.squeeze(0) if self.keeps_rows and logits.ndim == 3 else logits

    @torch.inference_mode()
    def _check_rows(self) -> bool:
        """Whether `logits_to_keep` takes a mask and gives those very rows: asked of the model, not of its name."""
        if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
            return False
        ids = torch.arange(6, device=self.device).reshape(2, 3) % self.vocab_size
        keep = torch.tensor([[False, True, False], [True, False, True]], device=self.device)
        everything = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        full = self.model(**everything).logits[keep]
        try:
            rows = self.model(**everything, logits_to_keep=keep).logits
        except (IndexError, RuntimeError, TypeError, ValueError):
            return False
        rows = rows.squeeze(0) if rows.ndim == 3 else rows
        if rows.shape != full.shape:
            return False
        # The same rows up to the rounding of a product of another shape; other rows differ by far more.
        unit = torch.finfo(full.dtype).eps * float(full.abs().max())
        return bool((rows - full).abs().max() <= 64 * unit)


def load_model(
    model: str | Path | tuple[Any, Any],
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
) -> CausalLM:
    """Loads a model by hub name, folder or GGUF file, or takes a loaded `(model, tokenizer)` pair as it is.

    `dtype` auto: float32 on a CPU, the checkpoint's type on a GPU. Raises FileNotFoundError for a missing file,
    ValueError for a model or tokenizer that cannot be loaded, with the reason.
    """
    target = choose_device(device)
    chosen = choose_dtype(dtype, target)
    if isinstance(model, tuple):
        if len(model) != 2:
            raise TypeError(f"a loaded model is given as (model, tokenizer), got {len(model)} items")
        loaded, own_tokenizer = model
        if device != "auto":
            loaded = loaded.to(target)
        if dtype != "auto":
            loaded = loaded.to(chosen)
        return CausalLM(loaded, tokenizer or own_tokenizer, getattr(loaded, "name_or_path", "") or "the model")
    if not isinstance(model, str | Path):
        raise TypeError(f"model should be a name, a path or a (model, tokenizer) pair, it is {type(model).__name__}")
    folder, extra = _locate(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if tokenizer is None or isinstance(tokenizer, str | Path):
        place, options = (folder, extra) if tokenizer is None else _locate(tokenizer)
        tokenizer = _load(AutoTokenizer, "tokenizer", place, options)
    loaded = _load(AutoModelForCausalLM, "model", folder, {**extra, "dtype": chosen})
    return CausalLM(loaded.to(target), tokenizer, str(model))


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
