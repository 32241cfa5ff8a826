"""What is checked of the arguments, once, before anything else sees them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

# The numbers are DType in csrc/rows.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_FLOAT32 = torch.finfo(torch.float32)

# The fields of `Logits` in csrc/rows.h: address, dtype, rows, V, row stride, rows per batch, batch stride.
Packed = tuple[int, int, int, int, int, int, int]
ScaledPacked = tuple[int, int, int, int, int, int, int, float, float]


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call may go past torch's dispatcher: none but real tensors, that no tracer, mode or transform looks at.

    Of any other, even one that only names rows, `data_ptr` may be 0.
    """
    if torch.compiler.is_compiling():
        return False
    for values in tensors:
        if values is not None and (type(values) is not Tensor or values.is_meta or values._is_zerotensor()):
            return False
    return (
        not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def check_kinds(floats: dict[str, Tensor | None], integers: dict[str, Tensor | None]) -> None:
    """What has to be said of arguments by name before torch's dispatcher, which speaks of schemas; None passes."""
    for name, values in integers.items():
        if values is not None:
            check_indices(name, values)
    if torch.compiler.is_compiling():
        return
    for name, values in floats.items():
        if values is not None:
            check_floats(name, values)
    check_fakes([values for values in floats.values() if values is not None], integers)


def check_fakes(floats: Sequence[Tensor], integers: dict[str, Tensor | None]) -> None:
    """Raises where real tensors have fake indices, unless their mode takes both."""
    for name, values in integers.items():
        if (
            isinstance(values, FakeTensor)
            and not values.fake_mode.allow_non_fake_inputs
            and all(type(beside) is Tensor for beside in floats)
        ):
            raise TypeError(f"{name} are a fake tensor, which has no data, beside a real one")


def check_floats(name: str, values: Tensor) -> None:
    """Raises unless `values` is a strided tensor of floats that needs no gradient."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, not {kind(values)}")
    if values.dtype not in DTYPES:
        raise TypeError(f"{name} {_verb(name, 'are')} {values.dtype}, must be float32, bfloat16 or float16")
    if values.is_nested:
        raise TypeError(
            f"{name} {_verb(name, 'are')} a nested tensor, it must have one shape; call {name}.to_padded_tensor(0)"
        )
    if values.layout is not torch.strided:
        raise TypeError(
            f"{name} {_verb(name, 'have')} layout {values.layout}, it must be torch.strided; call {name}.to_dense()"
        )
    check_gradient(name, values)
    if values.is_neg():
        raise ValueError(
            f"{name} {_verb(name, 'are')} a negative view, whose memory holds other values; call {name}.resolve_neg()"
        )


def check_gradient(name: str, values: Tensor) -> None:
    """Raises where a result without a gradient or tangent would be a silent zero."""
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} {_verb(name, 'require')} a gradient, which this forward-only function cannot give: call it under "
            f"torch.no_grad(), or pass {name}.detach()"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None:
        raise ValueError(
            f"{name} {_verb(name, 'have')} a tangent, for which this function has no forward derivative: pass "
            f"{name}.detach()"
        )


def _verb(name: str, plural: str) -> str:
    several = name.endswith(("logits", "partials"))
    return plural if several else {"are": "is", "have": "has", "require": "requires"}[plural]


def check_logits(name: str, logits: Tensor) -> None:
    """Raises unless `logits` is [rows, V] or [B, T, V] and `check_floats` passes."""
    check_floats(name, logits)
    if logits.ndim not in (2, 3):
        raise ValueError(f"{name} have shape {tuple(logits.shape)}, it must be [rows, V] or [B, T, V]")


def pack_logits(name: str, logits: Tensor) -> Packed:
    """How the rows lie in memory, after all checks that need no data."""
    check_logits(name, logits)
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
        DTYPES[logits.dtype],
        num_rows,
        vocab,
        strides[-2],
        rows_per_batch or 1,
        batch_stride,
    )


def check_pair(one_shot: Tensor, zero_shot: Tensor, name: str, width: str) -> None:
    """Raises unless both have one dtype, device and width."""
    for what, one, zero in (
        ("dtype", one_shot.dtype, zero_shot.dtype),
        ("device", one_shot.device, zero_shot.device),
        (width, one_shot.shape[-1], zero_shot.shape[-1]),
    ):
        if one != zero:
            raise ValueError(f"zero_shot_{name} have {what} {zero}, it must be {one}, that of one_shot_{name}")


def check_indices(name: str, values: Tensor) -> None:
    """Raises unless `values` is a one-dimensional tensor of int64 or int32."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be an int64 or int32 tensor, not {kind(values)}")
    if values.dtype is not torch.int64 and values.dtype is not torch.int32:
        raise TypeError(f"{name} are {values.dtype}, they must be int64 or int32")
    if values.is_nested:
        raise TypeError(f"{name} are a nested tensor, they must have one dimension; call torch.cat({name}.unbind())")
    if values.layout is not torch.strided:
        raise TypeError(f"{name} have layout {values.layout}, it must be torch.strided; call {name}.to_dense()")
    if values.ndim != 1:
        raise ValueError(f"{name} have shape {tuple(values.shape)}, they must have one dimension")


def indices(name: str, values: Tensor, beside: Tensor) -> Tensor:
    """`values` as adjacent int64, on the device of the logits or hidden states `beside` them."""
    if (
        type(values) is not Tensor
        or values.dtype is not torch.int64
        or values.ndim != 1
        or values.layout is not torch.strided
    ):
        check_indices(name, values)
        values = values.to(torch.int64)
    if not (values.is_cpu and beside.is_cpu) and values.device != beside.device:
        raise ValueError(f"{name} are on {values.device}, they must be on {beside.device}, where the logits are")
    if values.is_neg():
        values = values.resolve_neg()
    return values if values.is_contiguous() else values.contiguous()


def rows_of(name: str, rows: Tensor | None, targets: Tensor, beside: Tensor, num_rows: int) -> Tensor | None:
    """`rows`, one for each target; None where there is a target for every row."""
    if rows is None:
        if num_rows != targets.numel():
            raise ValueError(
                f"targets have {targets.numel()} entries, they must have {num_rows}, one for each row of the logits; "
                f"give {name} to score some of the rows"
            )
        return None
    rows = indices(name, rows, beside)
    if rows.numel() != targets.numel():
        raise ValueError(f"{name} have {rows.numel()} entries, they must have {targets.numel()}, one for each target")
    return rows


def offsets_of(offsets: Tensor, beside: Tensor) -> Tensor:
    """`offsets` of at least no response."""
    offsets = indices("offsets", offsets, beside)
    if not offsets.numel():
        raise ValueError("offsets are empty, they must have one entry more than there are responses")
    return offsets


def check_range(name: str, values: Tensor | None, end: int | None, what: str) -> None:
    """Raises for an entry outside [0, end), in the words of the CPU kernels; waits for a device."""
    if values is None:
        return
    bad = values < 0 if end is None else (values < 0) | (values >= end)
    if len(places := bad.nonzero()):
        first = int(places[0])
        raise ValueError(
            f"{name}[{first}] is {int(values[first])}, outside [0, {'...' if end is None else end}), {what}"
        )


def check_values(
    targets: Tensor, num_rows: int, vocab: int, offsets: Tensor | None = None, **rows: Tensor | None
) -> None:
    """What the CPU kernels check while they run, in the same words, for data on a device that cannot raise."""
    for name, values in rows.items():
        check_range(name, values, num_rows, "the rows of the logits")
    check_range("targets", targets, vocab, "the vocabulary of the logits")
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


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    hidden_name: str = "hidden",
) -> None:
    """Raises unless hidden states and an output head fit each other."""
    check_hidden(hidden_name, hidden)
    for name, values in (("weight", weight), *([] if bias is None else [("bias", bias)])):
        check_floats(name, values)
        if values.dtype != hidden.dtype:
            raise TypeError(f"{name} is {values.dtype}, it must be {hidden.dtype}, the dtype of {hidden_name}")
        if values.device != hidden.device:
            raise ValueError(f"{name} is on {values.device}, it must be on {hidden.device}, where {hidden_name} is")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, it must be [V, {hidden.shape[-1]}], V at least 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, it must be [{weight.shape[0]}], one for each of V")
    check_factors(softcap, scale)


def check_hidden(name: str, hidden: Tensor) -> None:
    """Raises unless `hidden` is [rows, H] or [B, T, H] and `check_floats` passes."""
    check_floats(name, hidden)
    if hidden.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {tuple(hidden.shape)}, it must be [rows, H] or [B, T, H]")


def check_factors(softcap: float | None, scale: float) -> None:
    """Raises unless the scale, and the softcap where there is one, are finite numbers above 0 in float32."""
    for name, value in (("scale", scale), *([] if softcap is None else [("softcap", softcap)])):
        number = isinstance(value, (float, int)) and not isinstance(value, bool)  # torch 2.6 cannot trace a union
        if not (number and _FLOAT32.tiny <= value <= _FLOAT32.max):
            raise ValueError(f"{name} is {_show(value)}, it must be a finite number above 0 in float32")


def check_flag(name: str, value: bool) -> None:
    """Raises unless `value` is True or False."""
    if type(value) is not bool:
        raise TypeError(f"{name} must be True or False, not {kind(value)}")


def check_integer(name: str, value: int, least: int = -(2**63)) -> int:
    """`value` as an int, NumPy's integers included. Raises unless it is an int64 of `least` or more."""
    if not isinstance(value, int):
        if isinstance(value, Tensor) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, not {kind(value)}")
        value = operator.index(value)
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not bool")
    if not least <= value < 2**63:
        raise ValueError(f"{name} is {value}, it must be {least} to 2^63 - 1")
    return value


def check_partials(partials: Sequence[Tensor], offsets: Tensor) -> None:
    """Raises unless these are results of `response_nll_partials` for the same tokens."""
    if not isinstance(partials, Sequence) or not partials:
        what = "an empty one" if isinstance(partials, Sequence) else kind(partials)
        raise TypeError(f"partials must be a list of at least one tensor, not {what}")
    for place, part in enumerate(partials):
        if not isinstance(part, Tensor) or part.dtype is not torch.float64:
            raise TypeError(f"partials[{place}] must be a float64 tensor, not {kind(part)}")
        if part.ndim != 2 or part.shape[1] != 3 or part.shape != partials[0].shape:
            expected = f"[{partials[0].shape[0]}, 3]" if partials[0].ndim == 2 else "[T, 3]"
            raise ValueError(f"partials[{place}] has shape {tuple(part.shape)}, it must be {expected}")
        if part.is_meta != partials[0].is_meta:
            raise ValueError(f"partials[{place}] is on {part.device}, partials[0] on {partials[0].device}")
        check_gradient(f"partials[{place}]", part)
    check_indices("offsets", offsets)


def _show(value: object) -> str:
    return kind(value) if isinstance(value, Tensor) else f"{value!r:.40}"


def kind(value: object) -> str:
    """What a value is, for a message."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
