// log p(target) of logits rows and its means over responses, from one read of the logits.
//
//   log p(t | x) = x[t] - m - log(sum_v exp(x[v] - m)),  m = max_v x[v]
//
// Streaming softmax (Milakov and Gimelshein, arXiv 1805.02867) with one exponential per element; 2 or 4 bytes and about
// 6 instructions per element, 8 where not every row starts on 16 bytes; a softcap takes 18 more and a second
// exponential. For means, 8 bytes of scratch memory per token and logits.
//
// How a row is summed depends on its length alone, never on its address, on the other rows, or on how many blocks work
// on it, and so do the bits of the result:
//   - Which thread adds which element goes by the element's index. The first vector (16 bytes), the last whole one and
//     what follows are peeled; the vectors between them, the body, can be had from aligned loads that stay inside the
//     row wherever it starts.
//   - The body is divided into slices. In each, every warp of a block makes one partial sum; a row's partial sums are
//     put together in their order. One block does all slices of a row, or one block each does one.
//   - Nothing is fused into an FMA that is not written as one (the file is compiled with -fmad=false).
#pragma once

#include <type_traits>

#include "streaming.cuh"

namespace miwv::cuda {
namespace {  // for one source file, rows_cuda.cu

constexpr uint32_t kThreads = 256;
constexpr uint32_t kWarps = kThreads / 32;
constexpr uint32_t kTile = kThreads * kLoads;
constexpr uint32_t kMaxSlices = 64;
constexpr uint32_t kOneWarpVectors = 512;  // a body up to this long is left to one warp, and a block does kWarps rows
constexpr int kReduceThreads = 128;

// Blocks per multiprocessor that registers must leave room for. Each has kTile vectors in flight: 4 blocks 64 KB, 3
// blocks 48 KB (and as much again of the bytes that neighbouring threads share where rows are not aligned).
constexpr int min_blocks(uint32_t group, bool aligned) {
  return group == kThreads && aligned ? 4 : 3;
}

// ---- Parameters

struct SweepParams {
  Logits logits[2];        // [0] alone, or one-shot and zero-shot: a side each
  const int64_t* rows[2];  // or null
  const int64_t* targets;
  int64_t num_tokens;
  int64_t first;  // the first entry of the rows has this number among the targets
  float scale;    // of differences of logits; 1 with a softcap, which has the scale in it
  float c;        // kLog2E * scale: an exponential is 2^(c * (x - max))
  Capped cap;
  uint32_t body;  // vectors in it
  uint32_t slices;
  uint32_t slice_vectors;
  // Where a row's result goes, one of three:
  float* out;        // [num_tokens]
  double* logprobs;  // [sides][num_tokens]
  Partial* added;    // [num_tokens]: a row is added to its partial or, with begin, becomes it
  bool begin;
  OnlineSoftmax* partials;  // [sides][num_tokens][slices * kWarps] where rows are split, otherwise null
};

struct CombineSlicesParams {
  const Partial* partials[2];  // [num_slices][num_tokens]; the second is null where blockIdx.y is 0 only
  int64_t num_slices;
  int64_t num_tokens;
  double* logprobs;  // [sides][num_tokens]
};

struct ReduceParams {
  const double* plus;  // [num_tokens] or null
  const double* minus;
  int64_t num_tokens;
  const int64_t* offsets;
  float* out;
};

// ---- Where things are

// A token's row, null where there is none.
template <class D>
__device__ __forceinline__ const typename D::Raw* locate(const SweepParams& p, int side, int64_t token) {
  // Selected, not indexed: an index that is only known at run time would put the parameters into local memory.
  const Logits logits = side == 0 ? p.logits[0] : p.logits[1];
  const int64_t* const rows = side == 0 ? p.rows[0] : p.rows[1];
  const int64_t row = rows ? rows[token] : token;
  if (row < 0 || row >= logits.num_rows) return nullptr;
  const int64_t offset = logits.num_rows == logits.rows_per_batch ? row * logits.row_stride : logits.row_offset(row);
  return static_cast<const typename D::Raw*>(logits.data) + offset;
}

// A target's logit, NaN where the row doesn't hold it.
template <class D>
__device__ __forceinline__ typename D::Raw load_target(const SweepParams& p, const typename D::Raw* row,
                                                       int64_t target) {
  const uint64_t index = static_cast<uint64_t>(target) - static_cast<uint64_t>(p.first);
  return index < static_cast<uint64_t>(p.logits[0].vocab) ? load_one(row + index) : D::nan();
}

// ---- Kernels

// The partial sums of a row that a block does alone.
__device__ __forceinline__ OnlineSoftmax* block_partials() {
  __shared__ OnlineSoftmax shared_partials[kMaxSlices * kWarps];
  return shared_partials;
}

// What a slice of the vocabulary is added to, where it is.
__device__ __forceinline__ Partial load_partial(const SweepParams& p, int64_t token) {
  return p.added && !p.begin ? p.added[token] : Partial{-FLT_MAX, 0, NAN};
}

__device__ __forceinline__ Partial add_slice(const Partial& old, const OnlineSoftmax& slice, float target,
                                             float scale) {
  const float old_max = static_cast<float>(old.max), slice_max = slice.max * scale, max = fmaxf(old_max, slice_max);
  const float grown = static_cast<float>(old.sum) * exp_relative(old_max, max, kLog2E);
  return {max, fmaf(slice.sum, exp_relative(slice_max, max, kLog2E), grown),
          isnan(target) ? old.target : static_cast<double>(target) * scale};
}

__device__ __forceinline__ void write_row(const SweepParams& p, int side, int64_t token, const OnlineSoftmax& row,
                                          float target, const Partial& old) {
  if (p.added)
    p.added[token] = add_slice(old, row, target, p.scale);
  else if (p.out)
    p.out[token] = static_cast<float>(log_probability(row, target, p.scale));
  else
    p.logprobs[side * p.num_tokens + token] = log_probability(row, target, p.scale);
}

__device__ __forceinline__ void write_bad_row(const SweepParams& p, int side, int64_t token) {
  write_row(p, side, token, {0, NAN}, NAN, load_partial(p, token));
}

template <class Map>
__device__ __forceinline__ Map make_map(const SweepParams& p) {
  if constexpr (std::is_same_v<Map, Plain>)
    return {};
  else
    return p.cap;
}

// kGroup threads do a row: a warp, or a block. blockIdx is (row or rows, slice where rows are split, side). kAligned:
// every row starts on 16 bytes.
template <class D, class Map, uint32_t kGroup, bool kAligned>
__global__ void __launch_bounds__(kThreads, min_blocks(kGroup, kAligned)) sweep(const __grid_constant__ SweepParams p) {
  using Raw = typename D::Raw;
  constexpr uint32_t kPerVector = 16 / sizeof(Raw);
  static_assert(kGroup >= 3 * kPerVector - 1, "one thread for each peeled element");

  const uint32_t t = threadIdx.x % kGroup, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int side = blockIdx.z;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kThreads / kGroup) + threadIdx.x / kGroup;
  if (token >= p.num_tokens) return;
  const Raw* const row = locate<D>(p, side, token);
  if (!row) {  // for all threads of the group alike
    if (t == 0 && !p.partials) write_bad_row(p, side, token);
    return;
  }

  // The scalar loads go first, and what they bring waits until vectors are done.
  const Map map = make_map<Map>(p);
  const int64_t target = p.targets[token];
  Raw peeled_raw{}, target_raw{};
  const uint32_t vocab = static_cast<uint32_t>(p.logits[0].vocab);
  const uint32_t peeled = vocab - p.body * kPerVector;
  const bool has_peeled = t < peeled && blockIdx.y + 1 == gridDim.y;  // they go with the last slice
  if (has_peeled) peeled_raw = load_one(row + (t < kPerVector ? t : vocab - peeled + t));

  const uintptr_t start = reinterpret_cast<uintptr_t>(row + kPerVector);
  const uint32_t past = start % 16;
  const Vec16* const aligned = reinterpret_cast<const Vec16*>(start - past);
  OnlineSoftmax acc;
  for (uint32_t slice = blockIdx.y; slice < p.slices; slice += gridDim.y) {
    acc = OnlineSoftmax();
    const uint32_t begin = slice * p.slice_vectors, end = min(begin + p.slice_vectors, p.body);
    add_share<D, Map, kGroup, kAligned>(acc, aligned, begin + t, end, past, map, p.c);
    if (has_peeled && slice + 1 == p.slices) add_logit(acc, map(D::from_raw(after(peeled_raw, acc.sum))), p.c);
    // Now, so that neither the first vectors wait for it nor the end.
    if (t == 0 && slice == 0 && !p.partials) target_raw = load_target<D>(p, row, after(target, acc.sum));
    acc = warp_combine(acc, p.c);
    if constexpr (kGroup == kThreads) {
      if (lane == 0) {
        if (p.partials)
          p.partials[((side * p.num_tokens + token) * p.slices + slice) * kWarps + warp] = acc;
        else
          block_partials()[slice * kWarps + warp] = acc;
      }
    }
  }

  if constexpr (kGroup == kThreads) {
    if (p.partials) return;
  }
  Partial old;
  if (t == 0) old = load_partial(p, token);
  if constexpr (kGroup == kThreads) {
    __syncthreads();  // the first warp reads what all have written
    if (warp != 0) return;
    acc = combine_partials(block_partials(), p.slices * kWarps, p.c);
  }
  if (t == 0) write_row(p, side, token, acc, map(D::from_raw(after(target_raw, acc.sum))), old);
}

// The end of rows that were split: a warp does a row. blockIdx is (rows, 0, side).
template <class D, class Map>
__global__ void __launch_bounds__(kThreads) combine_rows(const __grid_constant__ SweepParams p) {
  const int side = blockIdx.z;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= p.num_tokens) return;
  const typename D::Raw* const row = locate<D>(p, side, token);
  const bool first = threadIdx.x % 32 == 0;
  if (!row) {
    if (first) write_bad_row(p, side, token);
    return;
  }
  float logit = NAN;
  Partial old;
  if (first) {
    old = load_partial(p, token);
    logit = make_map<Map>(p)(D::from_raw(load_target<D>(p, row, p.targets[token])));
  }
  const uint32_t count = p.slices * kWarps;
  const OnlineSoftmax sum = combine_partials(p.partials + (side * p.num_tokens + token) * count, count, p.c);
  if (first) write_row(p, side, token, sum, logit, old);
}

// The log-probability of a token from its partials over slices of the vocabulary; a thread does a token. blockIdx is
// (tokens, side).
__global__ void __launch_bounds__(kThreads) combine_slices(const __grid_constant__ CombineSlicesParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= p.num_tokens) return;
  const Partial* const partials = blockIdx.y == 0 ? p.partials[0] : p.partials[1];
  SoftmaxSum sum{0, 0};
  double target = NAN;
  for (int64_t s = 0; s < p.num_slices; ++s) {
    const Partial slice = partials[s * p.num_tokens + token];
    sum = combine(sum, {slice.max, slice.sum});
    if (!isnan(slice.target)) target = slice.target;
  }
  p.logprobs[blockIdx.y * p.num_tokens + token] = log_probability(sum, target);
}

// The mean of plus - minus over the tokens of a response; a block does a response.
__global__ void __launch_bounds__(kReduceThreads) reduce_responses(const __grid_constant__ ReduceParams p) {
  __shared__ double shared_sums[kReduceThreads / 32];
  const int64_t begin = p.offsets[blockIdx.x], end = p.offsets[blockIdx.x + 1];
  const bool usable = 0 <= begin && begin < end && end <= p.num_tokens;
  double sum = 0;
  if (usable)
    for (int64_t t = begin + threadIdx.x; t < end; t += kReduceThreads) sum += (p.plus ? p.plus[t] : 0) - p.minus[t];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kReduceThreads / 32; ++warp) sum += shared_sums[warp];
  p.out[blockIdx.x] = usable ? static_cast<float>(sum / static_cast<double>(end - begin)) : NAN;
}

}  // namespace
}  // namespace miwv::cuda
