// Launches of the kernels in kernels.cuh: how rows are divided, which of them are split, and where results go.
#include "rows_cuda.h"

#include <algorithm>
#include <climits>
#include <stdexcept>
#include <string>

#include "../check.h"
#include "kernels.cuh"

namespace miwv::cuda {
namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Params>
void start(void (*kernel)(Params), dim3 grid, int threads, const Launch& launch, const Params& params) {
#if defined(MIWV_EMULATION)
  (void)launch;
  emulation::run(grid, threads, [&] { kernel(params); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  check(cudaLaunchKernelEx(&config, kernel, params));
#endif
}

template <class Work>
void with_dtype(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::kFloat32:
      return work(Float32{});
    case DType::kBFloat16:
      return work(BFloat16{});
    case DType::kFloat16:
      return work(Float16{});
  }
  MIWV_ASSERT(false);
}

// How a row is divided: by its length and type alone.
void divide(SweepParams& p, const Logits& logits) {
  const int64_t per_vector = logits.dtype == DType::kFloat32 ? 4 : 8;
  p.body = static_cast<uint32_t>(std::max<int64_t>(0, logits.vocab / per_vector - 2));
  const uint32_t tiles = (p.body + kTile * kMaxSlices - 1) / (kTile * kMaxSlices);
  p.slice_vectors = kTile * std::max(2u, tiles);
  p.slices = std::max(1u, (p.body + p.slice_vectors - 1) / p.slice_vectors);
}

// Few rows leave multiprocessors idle unless several blocks share a row; many rows need no second launch.
bool is_split(const SweepParams& p, int sides, int device, Split split) {
  if (p.slices == 1) return false;
  if (split != Split::kFewRows) return split == Split::kAlways;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return p.num_tokens * sides < 2 * multiprocessors;
}

// The means of responses need the log-probabilities of all tokens in scratch memory, before the partial sums.
int64_t logprob_bytes(int64_t num_tokens, int sides) {
  return num_tokens * sides * static_cast<int64_t>(sizeof(double));
}

void check_sizes(const Logits& logits, int64_t num_tokens) {
  MIWV_CHECK(logits.vocab >= 1 && logits.vocab < INT_MAX, "logits have V = ", logits.vocab,
             ", it must be at least 1 and less than 2^31 - 1 on CUDA");
  MIWV_CHECK(num_tokens < INT_MAX, "targets have ", num_tokens, " entries, on CUDA they must have less than 2^31 - 1");
}

// Whether every row starts on 16 bytes.
bool is_aligned(const Logits& logits) {
  const int64_t size = logits.dtype == DType::kFloat32 ? 4 : 2;
  const auto base = reinterpret_cast<uintptr_t>(logits.data);
  return base % 16 == 0 && logits.row_stride * size % 16 == 0 && logits.batch_stride * size % 16 == 0;
}

template <class D, class Map, bool kAligned>
void sweep_rows_of(const SweepParams& p, int sides, bool split, const Launch& launch) {
  const unsigned tokens = static_cast<unsigned>(p.num_tokens), by_warps = (tokens + kWarps - 1) / kWarps;
  if (p.body <= kOneWarpVectors)
    start(&sweep<D, Map, 32, kAligned>, dim3(by_warps, 1, sides), kThreads, launch, p);
  else
    start(&sweep<D, Map, kThreads, kAligned>, dim3(tokens, split ? p.slices : 1, sides), kThreads, launch, p);
  if (split) start(&combine_rows<D, Map>, dim3(by_warps, 1, sides), kThreads, launch, p);
}

// Fills in how and where, and launches what gives p.out or p.logprobs.
void sweep_rows(SweepParams& p, int sides, const Launch& launch) {
  if (p.num_tokens == 0) return;
  divide(p, p.logits[0]);
  const LogitTransform& transform = p.logits[0].transform;
  const bool capped = transform.softcap > 0;
  p.scale = capped ? 1 : transform.scale;
  p.c = kLog2E * p.scale;
  p.cap = {transform.softcap, transform.scale / transform.softcap};
  char* scratch = static_cast<char*>(launch.scratch);
  if (!p.out && !p.added) {
    p.logprobs = reinterpret_cast<double*>(scratch);
    scratch += logprob_bytes(p.num_tokens, sides);
  }
  const bool split = is_split(p, sides, launch.device, launch.split);
  if (split) p.partials = reinterpret_cast<OnlineSoftmax*>(scratch);
  with_dtype(p.logits[0].dtype, [&](auto d) {
    using D = decltype(d);
    const auto sweep_as = [&](auto map, auto aligned) {
      sweep_rows_of<D, decltype(map), decltype(aligned)::value>(p, sides, split, launch);
    };
    const bool aligned = is_aligned(p.logits[0]) && (sides == 1 || is_aligned(p.logits[1]));
    if (capped)
      aligned ? sweep_as(Capped{}, std::true_type{}) : sweep_as(Capped{}, std::false_type{});
    else
      aligned ? sweep_as(Plain{}, std::true_type{}) : sweep_as(Plain{}, std::false_type{});
  });
}

void reduce(const ReduceParams& p, int64_t num_responses, const Launch& launch) {
  MIWV_CHECK(num_responses < INT_MAX, "offsets are for ", num_responses,
             " responses, on CUDA there must be less than 2^31 - 1");
  if (num_responses == 0) return;
  start(&reduce_responses, dim3(static_cast<unsigned>(num_responses)), kReduceThreads, launch, p);
}

// torch has made the device current, as a rule. Setting it again would put the primary context in the place of a green
// one, whose default stream is another.
void use_device(const Launch& launch) {
  int current;
  check(cudaGetDevice(&current));
  if (current != launch.device) check(cudaSetDevice(launch.device));
}

}  // namespace

int64_t scratch_bytes(const Logits& logits, int64_t num_tokens, int sides, bool per_response, int device, Split split) {
  SweepParams p{};
  p.num_tokens = num_tokens;
  check_sizes(logits, num_tokens);
  divide(p, logits);
  int64_t bytes = per_response ? logprob_bytes(num_tokens, sides) : 0;
  if (is_split(p, sides, device, split))
    bytes += num_tokens * sides * p.slices * kWarps * static_cast<int64_t>(sizeof(OnlineSoftmax));
  return bytes;
}

void token_logprobs(const TokenParams& a, const Launch& launch) {
  check_sizes(a.logits, a.num_tokens);
  use_device(launch);
  SweepParams p{};
  p.logits[0] = a.logits;
  p.rows[0] = a.rows;
  p.targets = a.targets;
  p.num_tokens = a.num_tokens;
  p.out = a.out;
  sweep_rows(p, 1, launch);
}

void response_nll(const ResponseParams& a, const Launch& launch) {
  check_sizes(a.logits, a.num_tokens);
  use_device(launch);
  SweepParams p{};
  p.logits[0] = a.logits;
  p.rows[0] = a.rows;
  p.targets = a.targets;
  p.num_tokens = a.num_tokens;
  sweep_rows(p, 1, launch);
  reduce({nullptr, p.logprobs, a.num_tokens, a.offsets, a.out}, a.num_responses, launch);
}

void response_nll_difference(const DifferenceParams& a, const Launch& launch) {
  check_sizes(a.one_shot, a.num_tokens);
  use_device(launch);
  SweepParams p{};
  p.logits[0] = a.one_shot;
  p.logits[1] = a.zero_shot;
  p.rows[0] = a.one_shot_rows;
  p.rows[1] = a.zero_shot_rows;
  p.targets = a.targets;
  p.num_tokens = a.num_tokens;
  sweep_rows(p, 2, launch);
  reduce({p.logprobs + a.num_tokens, p.logprobs, a.num_tokens, a.offsets, a.out}, a.num_responses, launch);
}

void add_partials(const PartialParams& a, const Launch& launch) {
  check_sizes(a.logits, a.num_tokens);
  use_device(launch);
  SweepParams p{};
  p.logits[0] = a.logits;
  p.rows[0] = a.rows;
  p.targets = a.targets;
  p.num_tokens = a.num_tokens;
  p.first = a.first;
  p.added = a.partials;
  p.begin = a.begin;
  sweep_rows(p, 1, launch);
}

void combine_partials(const CombineParams& a, const Launch& launch) {
  use_device(launch);
  CombineSlicesParams p{{a.partials, a.minus}, a.num_slices, a.num_tokens, static_cast<double*>(launch.scratch)};
  const unsigned blocks = static_cast<unsigned>((a.num_tokens + kThreads - 1) / kThreads);
  if (a.num_tokens > 0) start(&combine_slices, dim3(blocks, a.minus ? 2 : 1), kThreads, launch, p);
  const double* const minus = a.minus ? p.logprobs + a.num_tokens : nullptr;
  reduce({minus, p.logprobs, a.num_tokens, a.offsets, a.out}, a.num_responses, launch);
}

}  // namespace miwv::cuda
