"""Data files as streams of bytes, unpacked as they are read, and the limits that hostile ones run into."""

from __future__ import annotations

import gzip
import io
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa

FORMATS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
# No model reads so much at once; as JSON it may take 30 times its size in Python objects.
MAX_RECORD_BYTES = 64 << 20
# Text packs 3 to 10 times smaller. A file that unpacks to more than this many times its size, and to more than what
# any machine holds, was made to fill the memory.
MAX_EXPANSION = 200
MAX_FREE_EXPANSION_BYTES = 1 << 30
BLOCK_BYTES = 1 << 20


def split_suffixes(path: Path) -> tuple[str, str]:
    """The format's suffix and the compression's, both lower case, the latter empty where there is none."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix, compression


class _Xz:
    """All streams of an .xz file; `lzma.open` leaves out, without a word, what follows one and is damaged."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._stream = lzma.LZMADecompressor()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, none at the end. Raises EOFError or lzma.LZMAError for damage."""
        data = b""
        while not data:
            packed = b""
            if self._stream.eof:
                packed = self._stream.unused_data
                while not (packed := packed.lstrip(b"\0")):  # zeros may stand between streams
                    if not (packed := self._file.read(BLOCK_BYTES)):
                        return b""
                self._stream = lzma.LZMADecompressor()
            elif self._stream.needs_input and not (packed := self._file.read(BLOCK_BYTES)):
                raise EOFError("the file ended before the end of a stream")
            data = self._stream.decompress(packed, size)
        return data

    def close(self) -> None:
        self._file.close()


class _Unpacked(io.RawIOBase):
    """What a packed file holds, as far as it may expand."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._left = max(MAX_FREE_EXPANSION_BYTES, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(
                f"{self._path} unpacks to more than {MAX_EXPANSION} times its size; if that is meant, unpack it first"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_file(path: Path, compression: str) -> io.BufferedReader:
    """The content of a file, unpacked. Reading raises ValueError where it expands beyond the limits."""
    if compression == ".gz":
        return io.BufferedReader(_Unpacked(gzip.open(path, "rb"), path), BLOCK_BYTES)
    if compression == ".xz":
        return io.BufferedReader(_Unpacked(_Xz(path), path), BLOCK_BYTES)
    if compression == ".zst":
        return io.BufferedReader(_Unpacked(pa.input_stream(str(path), compression="zstd"), path), BLOCK_BYTES)
    return path.open("rb")
