// The vector operations of row_sum_inl.h for AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../online_softmax.h"
#include "half.h"

#define MIWV_TARGET __attribute__((target("avx2,fma,f16c")))

namespace miwv::cpu {
namespace {
namespace avx2 {

struct Simd {
  using Float = __m256;
  struct Wide {
    __m256d low, high;
  };
  static constexpr int64_t kGroup = 32;

  MIWV_TARGET MIWV_INLINE static Float broadcast(float value) { return _mm256_set1_ps(value); }
  MIWV_TARGET MIWV_INLINE static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  MIWV_TARGET MIWV_INLINE static Float below(Float x, float limit, Float yes, Float no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
  }
  MIWV_TARGET MIWV_INLINE static Float exponent_from_low_bits(Float x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
  }
  // Of two operands one of which is NaN, the instructions give the second.
  MIWV_TARGET MIWV_INLINE static Float max_or_nan(Float bound, Float x) { return _mm256_max_ps(bound, x); }
  MIWV_TARGET MIWV_INLINE static Float min_or_nan(Float bound, Float x) { return _mm256_min_ps(bound, x); }
  MIWV_TARGET MIWV_INLINE static Float max_but_nan(Float top, Float x) { return _mm256_max_ps(x, top); }

  MIWV_TARGET MIWV_INLINE static void load_pair(const float* p, Float& first, Float& second) {
    first = _mm256_loadu_ps(p);
    second = _mm256_loadu_ps(p + 8);
  }
  MIWV_TARGET MIWV_INLINE static void load_pair(const BFloat16* p, Float& first, Float& second) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    first = _mm256_castsi256_ps(_mm256_unpacklo_epi16(_mm256_setzero_si256(), packed));
    second = _mm256_castsi256_ps(_mm256_unpackhi_epi16(_mm256_setzero_si256(), packed));
  }
  MIWV_TARGET MIWV_INLINE static void load_pair(const Float16* p, Float& first, Float& second) {
    first = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    second = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }

  // References are multiples of 1/8 and small enough that all constants made of them are exact.
  MIWV_TARGET MIWV_INLINE static float reference(float top, float c) { return std::rint(top * (8 * c)) / 8; }
  MIWV_TARGET MIWV_INLINE static double base2(float reference, float) { return reference; }
  MIWV_TARGET MIWV_INLINE static bool usable(float reference) { return std::fabs(reference) <= 0x1p13f; }
  template <class T>
  static SoftmaxSum fallback(const T* row, int64_t vocab, const LogitTransform& transform) {
    return generic::row_sum<T>(row, vocab, transform);
  }

  struct Shift {
    Float c, lowest, highest, round, center;
    MIWV_TARGET MIWV_INLINE Shift(float reference, float c)
        : c(broadcast(c)),
          lowest(broadcast((reference - 120) / c)),
          highest(broadcast((reference + 64) / c)),
          round(broadcast(kRound - reference)),
          center(broadcast(kCenter - reference)) {}
  };
  static constexpr float kRound = 0x1.8p20f;  // a sum with it is rounded to a multiple of 1/8
  static constexpr float kCenter = 739.0f / 512;

  // sum + 2^t for t = c * x - reference = n + f, n = i/8 for a whole i, |f| <= 1/16:
  //
  //   2^t = 2^floor(i/8) * 2^(i/8 - floor(i/8)) * 2^f
  //   2^f = kScale * (u^3 + kLinear * u + kConstant),   u = f + kCenter
  //
  // The minimax cubic is off by 2e-8. It needs no square term because its inflection is near -1/ln 2, so u costs
  // nothing: it is t rounded once, with another constant, less n. i stands in the low bits of `rounded`. Shifted by 20,
  // its upper part falls on the exponent and its lower three bits below it, which the table of kScale * 2^(j/8) takes
  // off again. t is held in [-120, 64], where this can't wrap: 2^-120 is nothing beside the sum, 2^64 is seen as
  // overflow. NaN passes.
  template <bool kMasked>
  MIWV_TARGET MIWV_INLINE static Float add_exp2(Float sum, Float x, const Shift& shift) {
    alignas(32) static constexpr int32_t kPowers[8] = {0x3d634696, 0x3d67d890, 0x3d672393, 0x3d635ebe,
                                                       0x3d60b54d, 0x3d5f40e8, 0x3d5f1d87, 0x3d6069ab};
    x = min_or_nan(shift.highest, max_or_nan(shift.lowest, x));
    const Float rounded = _mm256_fmadd_ps(x, shift.c, shift.round);
    const Float n = _mm256_sub_ps(rounded, _mm256_set1_ps(kRound));
    const Float u = _mm256_sub_ps(_mm256_fmadd_ps(x, shift.c, shift.center), n);
    const __m256i i = _mm256_castps_si256(rounded);
    const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPowers));
    const __m256i power = _mm256_add_epi32(_mm256_permutevar8x32_epi32(table, i), _mm256_slli_epi32(i, 20));
    const Float square = _mm256_fmadd_ps(u, u, _mm256_set1_ps(kLinear));
    const Float cubic = _mm256_fmadd_ps(square, u, _mm256_set1_ps(kConstant));
    return _mm256_fmadd_ps(_mm256_castsi256_ps(power), cubic, sum);
  }
  static constexpr float kLinear = 6.242153258551f;
  static constexpr float kConstant = 6.005560469489846f;

  MIWV_TARGET MIWV_INLINE static float horizontal_max(Float v) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    return *std::max_element(lanes, lanes + 8);
  }
  MIWV_TARGET MIWV_INLINE static bool all_at_most(Float v, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_NLE_UQ)) == 0;
  }
  MIWV_TARGET MIWV_INLINE static bool any_nan(Float v) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
  }

  MIWV_TARGET MIWV_INLINE static Wide wide_zero() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  MIWV_TARGET MIWV_INLINE static Wide scale(Wide a, double factor) {
    return {_mm256_mul_pd(a.low, _mm256_set1_pd(factor)), _mm256_mul_pd(a.high, _mm256_set1_pd(factor))};
  }
  MIWV_TARGET MIWV_INLINE static Wide widen_add(Wide a, Float v) {
    return {_mm256_add_pd(a.low, _mm256_cvtps_pd(_mm256_castps256_ps128(v))),
            _mm256_add_pd(a.high, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)))};
  }
  MIWV_TARGET MIWV_INLINE static double horizontal_sum(Wide a) {
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(a.low, a.high));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
};

#include "row_sum_inl.h"

}  // namespace avx2
}  // namespace
}  // namespace miwv::cpu

#undef MIWV_TARGET
