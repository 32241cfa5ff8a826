"""Log-probabilities of target tokens, read straight from logits: tensors in, tensors out.

Every needed row of logits is read once and one float32 per token or response is written; logits are never copied or
written to. The functions are forward only, run on CPU tensors (and on CUDA tensors where the kernels were built), and
are registered with `torch.library` as `torch.ops.miwv_fast.*`, so that `torch.compile` and fake tensors know them.

Common to all of them:

- logits are `[R, V]` or `[B, T, V]` (then row `b * T + t` is position t of sequence b), float32, bfloat16 or float16.
  The entries of a row must be adjacent; the other strides are free, so that `logits[:, :-1]` needs no copy.
- targets, rows and offsets are one-dimensional int64 or int32 tensors on the same device. `rows[t]` is the row that
  predicts `targets[t]`; without `rows`, row t does.
- `TypeError` or `ValueError` names the argument, its value, and what would have been right; on the CPU this includes a
  target outside `[0, V)`, a row that doesn't exist, and offsets that fall.
- On CUDA, calls go to the current stream and return at once; they can be captured in a CUDA graph. So what is only in
  the data cannot raise: a bad target or row makes its token and its response NaN, bad offsets their response.
  `check=True` waits for the device and raises the same errors as on the CPU, where it changes nothing.
- As in `torch.log_softmax`, a -inf logit is a legal zero probability, and NaN or +inf in a row, or nothing but -inf,
  makes its log-probability NaN. A response that has such a row, or no token at all, is NaN, and no other.
- The result depends on the rows and V alone, to the bit: not on strides, alignment, threads, or the rest of the batch.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from miwv_fast import _core

__all__ = ["build_info", "response_nll", "response_nll_difference", "rows_from_labels", "token_logprobs"]

# The numbers are DType in csrc/rows.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Whether several blocks of a GPU share a row: 1 always, 0 never, -1 where there are few rows. Only time depends on it;
# tests and benchmarks change it.
_cuda_split = -1


def token_logprobs(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    """Log-probability in nats of each target token, float32 `[T]`.

    `out[t] = log_softmax(logits[rows[t]])[targets[t]]`, for targets `[T]` and rows `[T]`.
    """
    if _is_plain("logits", logits):
        return _token_logprobs(logits, targets, rows, check=check)
    return torch.ops.miwv_fast.token_logprobs.default(logits, targets, rows, check=check)


def response_nll(
    logits: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    """Mean negative log-likelihood in nats of each response, float32 `[B]`.

    Response b owns the targets `offsets[b]` to `offsets[b + 1]`; offsets `[B + 1]` begin with 0, never fall, and end
    with T, the number of targets. This is L(y | x) of Jiang et al., arXiv 2511.07074.
    """
    if _is_plain("logits", logits):
        return _response_nll(logits, targets, offsets, rows, check=check)
    return torch.ops.miwv_fast.response_nll.default(logits, targets, offsets, rows, check=check)


def response_nll_difference(
    one_shot_logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    """One-shot minus zero-shot mean negative log-likelihood in nats of each response, float32 `[B]`: the MIWV.

    Both logits score the same targets, and have one V and one dtype. Jiang et al., arXiv 2511.07074.
    """
    if _is_plain("one_shot_logits", one_shot_logits) and _is_plain("zero_shot_logits", zero_shot_logits):
        return _response_nll_difference(
            one_shot_logits, zero_shot_logits, targets, offsets, one_shot_rows, zero_shot_rows, check=check
        )
    return torch.ops.miwv_fast.response_nll_difference.default(
        one_shot_logits, zero_shot_logits, targets, offsets, one_shot_rows, zero_shot_rows, check=check
    )


def rows_from_labels(labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """`(rows, targets, offsets)`, int64, for labels `[B, T]` in the convention of Hugging Face models.

    The logits at position t - 1 predict the label at position t, so `rows` are `b * T + t - 1` into logits `[B, T, V]`.
    A label at position 0 has nothing that predicts it and is left out, as Hugging Face's loss does.
    """
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise TypeError(f"labels must be an integer tensor, not {_kind(labels)}")
    if labels.ndim != 2:
        raise ValueError(f"labels must be [B, T], not {tuple(labels.shape)}")
    following = labels[:, 1:]
    scored = following != ignore_index
    batch, position = scored.nonzero(as_tuple=True)
    offsets = torch.zeros(labels.shape[0] + 1, dtype=torch.int64, device=labels.device)
    torch.cumsum(scored.sum(1), 0, out=offsets[1:])
    return batch * labels.shape[1] + position, following[scored].to(torch.int64), offsets


def build_info() -> dict[str, object]:
    """How the kernels were built and what they run on: version, cuda, isa, available_isas, threads."""
    return {
        "version": _core.version,
        "cuda": _core.has_cuda,
        "isa": _core.isa(),
        "available_isas": _core.available_isas(),
        "threads": torch.get_num_threads(),
    }


def _is_plain(name: str, logits: Tensor) -> bool:
    """Whether a call may go past torch's dispatcher: a real tensor that no tracer, mode or transform looks at."""
    if torch.compiler.is_compiling():
        return False
    plain = (
        type(logits) is Tensor
        and not logits.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )
    if not plain:
        _check_logits(name, logits)  # what is wrapped in a transform no longer shows that it requires a gradient
    return plain


def _token_logprobs(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    packed = _pack_logits("logits", logits)
    targets = _indices("targets", targets, logits)
    rows = _rows("rows", rows, targets, logits, packed)
    _require_kernels(logits)
    if check and logits.is_cuda:
        _check_values(targets, packed, rows=rows)
    out = logits.new_empty(targets.numel(), dtype=torch.float32)
    arguments = (packed, _address(rows), targets.data_ptr(), targets.numel(), out.data_ptr())
    _run("token_logprobs", arguments, logits, packed, targets.numel(), sides=1, per_response=False)
    return out


def _response_nll(
    logits: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    packed = _pack_logits("logits", logits)
    targets = _indices("targets", targets, logits)
    offsets = _offsets(offsets, logits)
    rows = _rows("rows", rows, targets, logits, packed)
    _require_kernels(logits)
    if check and logits.is_cuda:
        _check_values(targets, packed, offsets, rows=rows)
    out = logits.new_empty(offsets.numel() - 1, dtype=torch.float32)
    responses = (targets.data_ptr(), targets.numel(), offsets.data_ptr(), out.numel(), out.data_ptr())
    arguments = (packed, _address(rows), *responses)
    _run("response_nll", arguments, logits, packed, targets.numel(), sides=1, per_response=True)
    return out


def _response_nll_difference(
    one_shot_logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    one_shot = _pack_logits("one_shot_logits", one_shot_logits)
    zero_shot = _pack_logits("zero_shot_logits", zero_shot_logits)
    for what, one, zero in (
        ("dtype", one_shot_logits.dtype, zero_shot_logits.dtype),
        ("device", one_shot_logits.device, zero_shot_logits.device),
        ("V", one_shot_logits.shape[-1], zero_shot_logits.shape[-1]),
    ):
        if one != zero:
            raise ValueError(f"zero_shot_logits have {what} {zero}, it must be {one}, that of one_shot_logits")
    targets = _indices("targets", targets, one_shot_logits)
    offsets = _offsets(offsets, one_shot_logits)
    one_shot_rows = _rows("one_shot_rows", one_shot_rows, targets, one_shot_logits, one_shot)
    zero_shot_rows = _rows("zero_shot_rows", zero_shot_rows, targets, zero_shot_logits, zero_shot)
    _require_kernels(one_shot_logits)
    if check and one_shot_logits.is_cuda:
        _check_values(targets, one_shot, offsets, one_shot_rows=one_shot_rows)
        _check_values(targets, zero_shot, zero_shot_rows=zero_shot_rows)
    out = one_shot_logits.new_empty(offsets.numel() - 1, dtype=torch.float32)
    responses = (targets.data_ptr(), targets.numel(), offsets.data_ptr(), out.numel(), out.data_ptr())
    arguments = (one_shot, zero_shot, _address(one_shot_rows), _address(zero_shot_rows), *responses)
    _run("response_nll_difference", arguments, one_shot_logits, one_shot, targets.numel(), sides=2, per_response=True)
    return out


def _run(
    name: str,
    arguments: tuple[object, ...],
    logits: Tensor,
    packed: tuple[int, ...],
    num_tokens: int,
    *,
    sides: int,
    per_response: bool,
) -> None:
    """Calls the kernel for the device of the logits; on CUDA with scratch memory of torch's, on its current stream."""
    if logits.is_cpu:
        getattr(_core, f"cpu_{name}")(*arguments, torch.get_num_threads())
        return
    index = logits.device.index
    with torch.cuda.device(index):
        size = _core.cuda_scratch_bytes(packed, num_tokens, sides, per_response, index, _cuda_split)
        scratch = torch.empty(size, dtype=torch.uint8, device=logits.device)
        launch = (index, torch.cuda.current_stream(index).cuda_stream, scratch.data_ptr(), _cuda_split)
        getattr(_core, f"cuda_{name}")(*arguments, launch)


def _pack_logits(name: str, logits: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """The fields of `Logits` in csrc/rows.h, after all checks that need no data."""
    _check_logits(name, logits)
    shape, strides = logits.shape, logits.stride()
    if len(shape) == 2:
        num_rows, vocab = shape
        rows_per_batch, batch_stride = num_rows, 0
    else:
        batches, rows_per_batch, vocab = shape
        num_rows, batch_stride = batches * rows_per_batch, strides[0]
    if strides[-1] != 1 and vocab > 1:
        raise ValueError(
            f"{name} have stride {strides[-1]} between the entries of a row, it must be 1; call {name}.contiguous()"
        )
    return (
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        num_rows,
        vocab,
        strides[-2],
        rows_per_batch or 1,
        batch_stride,
    )


def _check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a tensor, not {_kind(logits)}")
    if logits.dtype not in _DTYPES:
        raise TypeError(f"{name} are {logits.dtype}, they must be float32, bfloat16 or float16")
    if logits.layout is not torch.strided:
        raise TypeError(f"{name} have layout {logits.layout}, it must be torch.strided; call {name}.to_dense()")
    if logits.ndim not in (2, 3):
        raise ValueError(f"{name} have shape {tuple(logits.shape)}, it must be [rows, V] or [B, T, V]")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} require a gradient, which this forward-only function cannot give: call it under torch.no_grad(), "
            f"or pass {name}.detach()"
        )
    if logits.is_neg():
        raise ValueError(f"{name} are a negative view, whose memory holds other values; call {name}.resolve_neg()")


def _indices(name: str, values: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an int64 or int32 tensor, not {_kind(values)}")
    if values.dtype is not torch.int64:
        if values.dtype is not torch.int32:
            raise TypeError(f"{name} are {values.dtype}, they must be int64 or int32")
        values = values.to(torch.int64)
    if values.ndim != 1:
        raise ValueError(f"{name} have shape {tuple(values.shape)}, they must have one dimension")
    if not (values.is_cpu and logits.is_cpu) and values.device != logits.device:
        raise ValueError(f"{name} are on {values.device}, they must be on {logits.device}, where the logits are")
    return values if values.is_contiguous() else values.contiguous()


def _rows(name: str, rows: Tensor | None, targets: Tensor, logits: Tensor, packed: tuple[int, ...]) -> Tensor | None:
    if rows is None:
        if packed[2] != targets.numel():
            raise ValueError(
                f"targets have {targets.numel()} entries, they must have {packed[2]}, one for each row of the logits; "
                f"give {name} to score some of the rows"
            )
        return None
    rows = _indices(name, rows, logits)
    if rows.numel() != targets.numel():
        raise ValueError(f"{name} have {rows.numel()} entries, they must have {targets.numel()}, one for each target")
    return rows


def _offsets(offsets: Tensor, logits: Tensor) -> Tensor:
    offsets = _indices("offsets", offsets, logits)
    if not offsets.numel():
        raise ValueError("offsets are empty, they must have one entry more than there are responses")
    return offsets


def _require_kernels(logits: Tensor) -> None:
    if logits.is_cpu or (logits.is_cuda and _core.has_cuda):
        return
    if logits.is_cuda:
        raise RuntimeError(
            "this build of miwv-fast has no CUDA kernels: install it again where nvcc is found, or with the "
            "environment variable MIWV_CUDA_WHEELS=1"
        )
    raise ValueError(f"logits are on {logits.device}, they must be on cpu or cuda")


def _check_values(
    targets: Tensor, packed: tuple[int, ...], offsets: Tensor | None = None, **rows: Tensor | None
) -> None:
    """What the CPU kernels check while they run, in the same words, for data on a device that cannot raise."""
    limits = [(name, values, packed[2], "the rows of the logits") for name, values in rows.items()]
    for name, values, end, what in [*limits, ("targets", targets, packed[3], "the vocabulary of the logits")]:
        if values is not None and len(bad := ((values < 0) | (values >= end)).nonzero()):
            first = int(bad[0])
            raise ValueError(f"{name}[{first}] is {int(values[first])}, outside [0, {end}), {what}")
    if offsets is None:
        return
    ends, count = offsets.tolist(), targets.numel()
    if ends[0] != 0:
        raise ValueError(f"offsets[0] is {ends[0]}, it must be 0")
    for b, (begin, end) in enumerate(pairwise(ends)):
        if begin > end:
            raise ValueError(f"offsets[{b + 1}] is {end}, less than offsets[{b}], which is {begin}")
    if ends[-1] != count:
        raise ValueError(f"offsets[{len(ends) - 1}] is {ends[-1]}, it must be {count}, the number of targets")


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


_library = torch.library.Library("miwv_fast", "DEF")


def _register(schema: str, implementation: object, fake: object) -> None:
    name = schema.split("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA", "Negative"):  # negative views are refused there, not copied behind the caller's back
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"miwv_fast::{name}", fake, lib=_library)


def _fake_token_logprobs(logits: Tensor, targets: Tensor, rows: Tensor | None = None, *, check: bool = False) -> Tensor:
    _check_logits("logits", logits)
    return logits.new_empty(targets.shape, dtype=torch.float32)


def _fake_response_nll(
    logits: Tensor, targets: Tensor, offsets: Tensor, rows: Tensor | None = None, *, check: bool = False
) -> Tensor:
    _check_logits("logits", logits)
    return logits.new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


def _fake_response_nll_difference(
    one_shot_logits: Tensor,
    zero_shot_logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    one_shot_rows: Tensor | None = None,
    zero_shot_rows: Tensor | None = None,
    *,
    check: bool = False,
) -> Tensor:
    _check_logits("one_shot_logits", one_shot_logits)
    _check_logits("zero_shot_logits", zero_shot_logits)
    return one_shot_logits.new_empty((offsets.shape[0] - 1,), dtype=torch.float32)


_register(
    "token_logprobs(Tensor logits, Tensor targets, Tensor? rows=None, *, bool check=False) -> Tensor",
    _token_logprobs,
    _fake_token_logprobs,
)
_register(
    "response_nll(Tensor logits, Tensor targets, Tensor offsets, Tensor? rows=None, *, bool check=False) -> Tensor",
    _response_nll,
    _fake_response_nll,
)
_register(
    "response_nll_difference(Tensor one_shot_logits, Tensor zero_shot_logits, Tensor targets, Tensor offsets, "
    "Tensor? one_shot_rows=None, Tensor? zero_shot_rows=None, *, bool check=False) -> Tensor",
    _response_nll_difference,
    _fake_response_nll_difference,
)
