"""Embeddings of the records' texts: each distinct text once, in chunks of like length, into one array."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from miwv_fast.fingerprint import hash_array, hash_weights
from miwv_fast.ops.matmul import fast_linear
from miwv_fast.progress import Progress

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
CALL_TEXTS = 8192
_MODEL_TEXTS = 512

Embedder = str | Path | np.ndarray | torch.Tensor | Callable[[list[str]], Any]
# Embeds chunks of texts, of which there are so many: the place of each chunk and its rows, in any order.
Chunks = Callable[[Iterator[pa.Array], int], Generator[tuple[int, Any]]]


@dataclass(frozen=True)
class Kept:
    """An embedder whose calls are kept by number, so that after an interruption none is made twice.

    `read(number)` gives the rows of a call that was made before, or None; `keep(number, rows)` is told of each new one.
    """

    embedder: str | Path | Callable[[list[str]], Any]
    read: Callable[[int], np.ndarray | None]
    keep: Callable[[int, np.ndarray], None]


def embed(
    texts: pa.Array | pa.ChunkedArray,
    embedder: Embedder | Kept,
    device: str,
    progress: Progress,
    elsewhere: Chunks | None = None,
) -> np.ndarray:
    """Embeddings float32 [N, D] of `texts`, large_string [N]; rows of null texts are 0.

    An array is checked and returned as it is. Anything else embeds each distinct text once, so that equal texts have
    embeddings that are equal to the byte; a callable gets lists of at most 8,192 texts, the longest first, and may not
    depend on which texts come together. Of a `Kept` embedder the calls that were kept are not made again; a named one
    runs `elsewhere` where that is given. Raises ValueError if the embedder's result is not one row of D numbers per
    text, or it cannot be loaded.
    """
    if isinstance(embedder, np.ndarray | torch.Tensor):
        return check_embeddings(embedder, len(texts))
    place, distinct = _find_distinct(texts)
    wanted = np.flatnonzero(place >= 0)
    # The records of each distinct text in turn; its first record's row is what the others copy.
    first = np.full(len(distinct), len(texts), np.int64)
    np.minimum.at(first, place[wanted], wanted)
    order = np.argsort(-pc.binary_length(distinct).to_numpy(zero_copy_only=False), kind="stable")
    calls = _Calls(embedder, device, elsewhere)
    chunk = CALL_TEXTS if callable(calls.embedder) else _MODEL_TEXTS
    chunks = [order[begin : begin + chunk] for begin in range(0, len(order), chunk)]
    embeddings: np.ndarray | None = None
    with progress.task("embedding", len(distinct), "records") as advance, closing(calls.run(distinct, chunks)) as made:
        for number, rows in made:
            chosen = chunks[number]
            width = None if embeddings is None else embeddings.shape[1]
            if rows.ndim != 2 or len(rows) != len(chosen) or not rows.shape[1] or width not in (None, rows.shape[1]):
                dimensions = "D" if width is None else width
                raise ValueError(
                    f"the embedder should give [{len(chosen)}, {dimensions}] for {len(chosen)} texts, "
                    f"got {list(rows.shape)}"
                )
            if embeddings is None:
                embeddings = np.zeros((len(texts), rows.shape[1]), np.float32)
            embeddings[first[chosen]] = rows
            advance(len(chosen))
    if embeddings is None:
        return np.zeros((len(texts), 1), np.float32)
    copies = wanted[first[place[wanted]] != wanted]
    for begin in range(0, len(copies), CALL_TEXTS):
        block = copies[begin : begin + CALL_TEXTS]
        embeddings[block] = embeddings[first[place[block]]]
    return embeddings


class _Calls:
    """Calls of an embedder by their number; it is loaded for the first that has to be made."""

    def __init__(
        self, embedder: str | Path | Kept | Callable[[list[str]], Any], device: str, elsewhere: Chunks | None
    ) -> None:
        self.kept = embedder if isinstance(embedder, Kept) else None
        self.embedder = embedder.embedder if isinstance(embedder, Kept) else embedder
        self._device = device
        self._elsewhere = elsewhere

    @cached_property
    def _encode(self) -> Callable[[list[str]], Any]:
        return self.embedder if callable(self.embedder) else load_embedder(self.embedder, self._device)

    def run(self, texts: pa.Array, chunks: list[np.ndarray]) -> Generator[tuple[int, np.ndarray]]:
        """Number and rows of every call: first those that were kept, then the others, `elsewhere` in any order."""
        left = []
        for number in range(len(chunks)):
            rows = self.kept.read(number) if self.kept is not None else None
            if rows is None:
                left.append(number)
            else:
                yield number, rows
        taken = (texts.take(pa.array(chunks[number])) for number in left)
        if self._elsewhere is None or callable(self.embedder):
            run = self._run_here(taken)
        else:
            run = self._elsewhere(taken, len(left))
        with closing(run) as made:
            for place, result in made:
                if isinstance(result, torch.Tensor):
                    result = result.detach().float().cpu().numpy()
                number, rows = left[place], np.asarray(result, np.float32)
                if self.kept is not None and rows.ndim == 2 and len(rows) == len(chunks[number]):
                    self.kept.keep(number, rows)
                yield number, rows

    def _run_here(self, chunks: Iterator[pa.Array]) -> Generator[tuple[int, Any]]:
        for place, texts in enumerate(chunks):
            with fast_linear():
                rows = self._encode(texts.to_pylist())
            yield place, rows


def open_embedder(embedder: Embedder) -> Embedder:
    """The embedder ready for `embed`: of a loaded model its `encode`, of a .npy file the array, mapped into memory.

    Raises TypeError for what is neither name, array nor callable, FileNotFoundError for a missing file, ValueError for
    one that holds no array.
    """
    if not isinstance(embedder, str | Path):
        if hasattr(embedder, "encode"):  # calling the model itself would run it on what is not tokenized
            embedder = embedder.encode
        if not isinstance(embedder, np.ndarray | torch.Tensor) and not callable(embedder):
            raise TypeError(
                "embedder should be a sentence-transformers name, folder or model, an array [N, D] or the .npy file of "
                f"one, or a function from texts to such arrays; it is {type(embedder).__name__}"
            )
        return embedder
    if not str(embedder):
        raise ValueError("the embedder has the empty text for its name")
    path = Path(embedder)
    if path.suffix != ".npy":
        return embedder
    if not path.is_file():
        raise FileNotFoundError(f"no such embedding file: {path}")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path} holds several arrays; save the embeddings alone, with numpy.save") from error
        raise ValueError(f"{path} is not an array that numpy.save wrote: {error}") from error


def check_embedder(embedder: Embedder) -> None:
    """Raises ValueError, before anything large is loaded, if an embedder given by name is not to be had."""
    if isinstance(embedder, str | Path) and not Path(embedder).exists():
        _find_on_hub(str(embedder))


def _find_on_hub(name: str) -> Path:
    """A file of the embedder in the hub's cache. Raises ValueError where there is none."""
    from transformers.utils.hub import cached_file

    # As sentence-transformers does: names without an owner are its own; any model of transformers will do.
    repository = name if "/" in name else f"sentence-transformers/{name}"
    reason: Exception | None = None
    for file in ("modules.json", "config.json"):
        try:
            return Path(str(cached_file(repository, file)))
        except (OSError, ValueError) as error:
            reason = error
    raise _cannot_load(name, reason) from reason


def describe_embedder(embedder: Embedder) -> str:
    """An embedder in words, for a manifest: its name or path, an array's shape and SHA-256, or what it is in Python."""
    if isinstance(embedder, str | Path):
        return str(embedder)
    if isinstance(embedder, np.ndarray):
        return f"array {list(embedder.shape)} sha256 {hash_array(embedder)}"
    name = getattr(embedder, "__qualname__", type(embedder).__name__)
    return f"callable {getattr(embedder, '__module__', '')}.{name}"


def identify_embedder(embedder: Embedder) -> str | None:
    """What an embedder is by content: a hub's revision, the SHA-256 of a folder's files or of a loaded model's weights.

    None where it is not at hand, or a function.
    """
    if not isinstance(embedder, str | Path):
        loaded = getattr(embedder, "__self__", None)  # whose `encode` it is
        return hash_weights(repr(loaded), loaded) if isinstance(loaded, torch.nn.Module) else None
    folder = Path(embedder)
    if not folder.is_dir():
        try:
            revision = _find_on_hub(str(embedder)).parent
        except ValueError:
            return None
        return revision.name if revision.parent.name == "snapshots" else None
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode(errors="surrogateescape"))
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_embeddings(embeddings: np.ndarray | torch.Tensor, records: int) -> np.ndarray:
    """The embeddings as float32 [N, D]; ValueError unless there is a row of floats for every input record."""
    if isinstance(embeddings, torch.Tensor):
        floats = embeddings.is_floating_point()
    else:
        floats = np.issubdtype(embeddings.dtype, np.floating)
    if embeddings.ndim != 2 or len(embeddings) != records or not embeddings.shape[1] or not floats:
        raise ValueError(
            f"an embedding array has a row of floats for every input record: expected [{records}, D], "
            f"got {list(embeddings.shape)} of {embeddings.dtype}"
        )
    array = embeddings.detach().float().cpu().numpy() if isinstance(embeddings, torch.Tensor) else embeddings
    return array.astype(np.float32, copy=False)


def _find_distinct(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """For each text its place among the distinct ones, int64, -1 for null; and those, large_string."""
    encoded = texts.dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary


def load_embedder(name: str | Path, device: str) -> Callable[[list[str]], np.ndarray]:
    """Gives embeddings [N, D] of texts by a model of sentence-transformers. Raises ValueError where there is none."""
    from sentence_transformers import SentenceTransformer

    try:
        # Pickled weights can run code; whoever trusts theirs loads them and passes `encode`.
        model = SentenceTransformer(str(name), device=device, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(str(name), error) from error

    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(model.encode(texts, batch_size=32, show_progress_bar=False))

    return encode


def _cannot_load(name: str, error: Exception | None) -> ValueError:
    hint = "another can be given by name or folder, or embeddings as an array"
    reason = str(error).strip().partition("\n")[0]
    return ValueError(f"cannot load the embedder {name!r} ({hint}): {reason}")
