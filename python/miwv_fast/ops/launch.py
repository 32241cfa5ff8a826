"""Calls of the compiled kernels: which device's, with how many threads, on which stream, with what scratch memory."""

from __future__ import annotations

import torch
from torch import Tensor

from miwv_fast import _core
from miwv_fast.ops.checks import Packed, ScaledPacked

# Whether several blocks of a GPU share a row: 1 always, 0 never, -1 where there are few rows. Only time depends on it;
# tests and benchmarks change it.
cuda_split = -1

NO_KERNELS = (
    "this build of miwv-fast has no CUDA kernels: install it again where nvcc is found, or with the environment "
    "variable MIWV_CUDA_WHEELS=1"
)

_NAMES = ("token_logprobs", "response_nll", "response_nll_difference", "add_partials")
_CPU = {name: getattr(_core, f"cpu_{name}") for name in _NAMES}


def require_kernels(tensor: Tensor) -> None:
    """Raises unless there are kernels for the tensor's device."""
    if tensor.is_cpu or (tensor.is_cuda and _core.has_cuda):
        return
    if tensor.is_cuda:
        raise RuntimeError(NO_KERNELS)
    raise ValueError(f"the tensors are on {tensor.device}, they must be on cpu or cuda")


def run_rows(
    name: str,
    arguments: tuple[object, ...],
    logits: Tensor,
    packed: Packed | ScaledPacked,
    num_tokens: int,
    *,
    sides: int = 1,
    per_response: bool = False,
) -> None:
    """Calls a kernel that reads rows of logits; on CUDA with scratch memory of torch's, on its current stream."""
    if logits.is_cpu:
        _CPU[name](*arguments, torch.get_num_threads())
        return
    index = logits.device.index
    with torch.cuda.device(index):
        size = _core.cuda_scratch_bytes(packed, num_tokens, sides, per_response, index, cuda_split)
        scratch = torch.empty(size, dtype=torch.uint8, device=logits.device)
        launch = (index, torch.cuda.current_stream(index).cuda_stream, scratch.data_ptr(), cuda_split)
        getattr(_core, f"cuda_{name}")(*arguments, launch)


def has_product() -> bool:
    """Whether this CPU multiplies bfloat16 matrices into a float32 one, and the instruction set in use may."""
    return _core.cpu_has_product()


def product(rows: Tensor, weight: Tensor, packed: Tensor, out: Tensor) -> None:
    """Writes `rows @ weight.T` float32 into `out`, whose rows and entries beyond those may be overwritten too.

    weight is bfloat16 [n, H]. In memory, rows bfloat16 [m, H] go on to the next multiples of 32, with zeros beyond the
    width; so do packed bfloat16 [n, H], which is scratch, and out [m, n].
    """
    sizes = (*weight.shape, packed.data_ptr(), out.data_ptr(), out.stride(0), torch.get_num_threads())
    _core.cpu_product(rows.data_ptr(), len(rows), rows.stride(0), weight.data_ptr(), weight.stride(0), *sizes)


def combine(partials: Tensor, minus: Tensor | None, offsets: Tensor) -> Tensor:
    """Mean NLL of each response, float32 [B], by partials float64 [slices, T, 3], less that by `minus`."""
    slices, num_tokens, _ = partials.shape
    out = partials.new_empty(offsets.numel() - 1, dtype=torch.float32)
    arguments = (partials.data_ptr(), address(minus), slices, num_tokens, offsets.data_ptr(), out.numel())
    if partials.is_cpu:
        _core.cpu_combine_partials(*arguments, out.data_ptr())
        return out
    index = partials.device.index
    with torch.cuda.device(index):
        logprobs = partials.new_empty(2, num_tokens)
        launch = (index, torch.cuda.current_stream(index).cuda_stream, logprobs.data_ptr(), cuda_split)
        _core.cuda_combine_partials(*arguments, out.data_ptr(), launch)
    return out


def read_memory(data: int, size: int) -> float:
    """Adds up `size` bytes at an address, for benchmarks: the least time that they can take on this CPU."""
    return _core.cpu_read(data, size)


def address(values: Tensor | None) -> int:
    """Where a tensor's data lie, 0 for none."""
    return 0 if values is None else values.data_ptr()
