// The streaming softmax of a row's vectors (16 bytes each): loads at any alignment, a thread's share, and how partial
// sums are put together. What is added to what, and in which order, goes by index alone.
#pragma once

#include <cfloat>
#include <cmath>

#include "../online_softmax.h"
#include "../rows.h"
#include "primitives.cuh"

namespace miwv::cuda {

constexpr int kLoads = 4;  // vectors that a thread has in flight

// sum_v 2^(c * (x[v] - max)), max the largest logit so far and c the logarithm of e to base 2 times the model's scale.
// It starts at the lowest finite float, not at -inf, so x - max is never (-inf) - (-inf): a run of -inf adds zeros, and
// no step needs a special case. +inf and NaN make the sum NaN.
struct OnlineSoftmax {
  float max = -FLT_MAX;
  float sum = 0.0f;
};

// 2^(c * (x - reference)). Subtracting first costs an instruction more than fma(x, c, -reference * c), but has no
// product to overflow (a row of finfo.min is a real input: every token masked) and is exact near the reference. A
// result that is flushed to 0 would not change a sum of at least 1.
__device__ __forceinline__ float exp_relative(float x, float reference, float c) {
  return exp2_approx((x - reference) * c);
}

// In double, because a float cannot hold a large logit difference and a small logarithm together.
__device__ __forceinline__ double log_probability(const OnlineSoftmax& row, float target_logit, float scale) {
  return (static_cast<double>(target_logit) - row.max) * scale - logf(row.sum);
}

// ---- A softcap. It never falls as x rises, so the largest logit of all is the largest under it, too

struct Plain {
  __device__ __forceinline__ float operator()(float x) const { return x; }
};

struct Capped {
  float softcap;
  float inner;  // scale / softcap
  __device__ __forceinline__ float operator()(float x) const { return softcap * tanhf(x * inner); }
};

// ---- Adding elements

__device__ __forceinline__ void add_logit(OnlineSoftmax& acc, float x, float c) {
  const float max = fmaxf(acc.max, x);
  acc.sum = fmaf(acc.sum, exp_relative(acc.max, max, c), exp_relative(x, max, c));
  acc.max = max;
}

// kCount vectors, `step` apart, the first of which begins `past` bytes behind an aligned one.
template <class D, bool kAligned, int kCount>
__device__ __forceinline__ void load_vectors(Vec16 (&out)[kCount], const Vec16* aligned, uint32_t step, uint32_t past) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    if constexpr (kAligned) {
      out[k] = load_once(aligned + k * step);
    } else {
      const Vec16 low = load_twice(aligned + k * step), high = load_twice(aligned + k * step + 1);
      uint32_t w[8];  // shifted by two words, by one word, by bits
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = low.word[i], w[i + 4] = high.word[i];
#pragma unroll
      for (int i = 0; i < 6; ++i) w[i] = past & 8 ? w[i + 2] : w[i];
#pragma unroll
      for (int i = 0; i < 5; ++i) w[i] = past & 4 ? w[i + 1] : w[i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[k].word[i] = D::kPerWord == 1 ? w[i] : __funnelshift_r(w[i], w[i + 1], past % 4 * 8);
    }
  }
}

// One new maximum and one rescaling for kCount vectors, then one exponential per element. A sum per vector keeps the
// dependent chains short.
template <class D, class Map, int kCount>
__device__ __forceinline__ void add_vectors(OnlineSoftmax& acc, const Vec16 (&v)[kCount], const Map& map, float c) {
  uint32_t top[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k)
    top[k] = D::max_words(D::max_words(v[k].word[0], v[k].word[1]), D::max_words(v[k].word[2], v[k].word[3]));
#pragma unroll
  for (int k = 1; k < kCount; ++k) top[0] = D::max_words(top[0], top[k]);
  const float max = fmaxf(acc.max, map(max_of_word<D>(top[0])));

  float sum = acc.sum * exp_relative(acc.max, max, c);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    float part = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int i = 0; i < D::kPerWord; ++i) {
        const float term = exp_relative(map(D::element(v[k].word[w], i)), max, c);
        part = w + i == 0 ? term : part + term;
      }
    sum += part;
  }
  acc.max = max;
  acc.sum = sum;
}

// This thread's share, one vector in `step`, of the vectors [i, end) that begin `past` bytes behind aligned ones.
template <class D, class Map, uint32_t kStep, bool kAligned>
__device__ __forceinline__ void add_share(OnlineSoftmax& acc, const Vec16* aligned, uint32_t i, uint32_t end,
                                          uint32_t past, const Map& map, float c) {
#pragma unroll 1
  for (; i + (kLoads - 1) * kStep < end; i += kLoads * kStep) {
    Vec16 v[kLoads];
    load_vectors<D, kAligned>(v, aligned + i, kStep, past);
    add_vectors<D>(acc, v, map, c);
  }
  Vec16 rest[kLoads - 1][1];
#pragma unroll
  for (int k = 0; k < kLoads - 1; ++k)
    if (i + k * kStep < end) load_vectors<D, kAligned>(rest[k], aligned + i + k * kStep, 0, past);
#pragma unroll
  for (int k = 0; k < kLoads - 1; ++k)
    if (i + k * kStep < end) add_vectors<D>(acc, rest[k], map, c);
}

// ---- Putting partial sums together

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, lane));
  return x;
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
  return x;
}

__device__ __forceinline__ OnlineSoftmax warp_combine(OnlineSoftmax acc, float c) {
  const float max = warp_max(acc.max);
  return {max, warp_sum(acc.sum * exp_relative(acc.max, max, c))};
}

// A whole row from its partial sums, by one warp.
__device__ __forceinline__ OnlineSoftmax combine_partials(const OnlineSoftmax* partials, uint32_t count, float c) {
  OnlineSoftmax acc;
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32) acc.max = fmaxf(acc.max, partials[i].max);
  acc.max = warp_max(acc.max);
  for (uint32_t i = threadIdx.x % 32; i < count; i += 32)
    acc.sum = fmaf(partials[i].sum, exp_relative(partials[i].max, acc.max, c), acc.sum);
  return {acc.max, warp_sum(acc.sum)};
}

}  // namespace miwv::cuda
