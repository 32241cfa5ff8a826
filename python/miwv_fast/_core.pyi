"""The compiled kernels. Only ops imports this; addresses and strides are those of tensors that it has checked."""

version: str
has_cuda: bool

# data, dtype, num_rows, vocab, row_stride, rows_per_batch, batch_stride[, scale, softcap (0 for none)]
_Logits = tuple[int, int, int, int, int, int, int] | tuple[int, int, int, int, int, int, int, float, float]

def isa() -> str: ...
def available_isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def cpu_read(data: int, bytes: int) -> float: ...
def cpu_has_product() -> bool: ...
def cpu_product(
    rows: int,
    num_rows: int,
    row_stride: int,
    weight: int,
    weight_stride: int,
    entries: int,
    width: int,
    packed: int,
    out: int,
    out_stride: int,
    num_threads: int,
) -> None: ...
def cpu_token_logprobs(
    logits: _Logits, rows: int, targets: int, num_tokens: int, out: int, num_threads: int
) -> None: ...
def cpu_response_nll(
    logits: _Logits,
    rows: int,
    targets: int,
    num_tokens: int,
    offsets: int,
    num_responses: int,
    out: int,
    num_threads: int,
) -> None: ...
def cpu_response_nll_difference(
    one_shot: _Logits,
    zero_shot: _Logits,
    one_shot_rows: int,
    zero_shot_rows: int,
    targets: int,
    num_tokens: int,
    offsets: int,
    num_responses: int,
    out: int,
    num_threads: int,
) -> None: ...
def cpu_add_partials(
    logits: _Logits,
    rows: int,
    targets: int,
    num_tokens: int,
    first: int,
    begin: bool,
    partials: int,
    num_threads: int,
) -> None: ...
def cpu_combine_partials(
    partials: int, minus: int, num_slices: int, num_tokens: int, offsets: int, num_responses: int, out: int
) -> None: ...

# Where has_cuda. The last argument: device, stream, scratch, split (1 always, 0 never, -1 where there are few rows).
_Launch = tuple[int, int, int, int]

def cuda_scratch_bytes(
    logits: _Logits, num_tokens: int, sides: int, per_response: bool, device: int, split: int
) -> int: ...
def cuda_token_logprobs(
    logits: _Logits, rows: int, targets: int, num_tokens: int, out: int, launch: _Launch
) -> None: ...
def cuda_response_nll(
    logits: _Logits,
    rows: int,
    targets: int,
    num_tokens: int,
    offsets: int,
    num_responses: int,
    out: int,
    launch: _Launch,
) -> None: ...
def cuda_response_nll_difference(
    one_shot: _Logits,
    zero_shot: _Logits,
    one_shot_rows: int,
    zero_shot_rows: int,
    targets: int,
    num_tokens: int,
    offsets: int,
    num_responses: int,
    out: int,
    launch: _Launch,
) -> None: ...
def cuda_add_partials(
    logits: _Logits,
    rows: int,
    targets: int,
    num_tokens: int,
    first: int,
    begin: bool,
    partials: int,
    launch: _Launch,
) -> None: ...
def cuda_combine_partials(
    partials: int,
    minus: int,
    num_slices: int,
    num_tokens: int,
    offsets: int,
    num_responses: int,
    out: int,
    launch: _Launch,
) -> None: ...
