"""A streaming read in Triton, 16 KB a program. In a file of its own because importing it needs Triton."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def read(source, out, count, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < count, other=0, eviction_policy="evict_first")
    tl.store(out + program, tl.sum(values, 0))
