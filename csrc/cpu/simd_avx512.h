// The vector operations of row_sum_inl.h for AVX-512 (F, DQ, BW, VL).
#pragma once

#include <immintrin.h>

#include "../online_softmax.h"
#include "half.h"

#define MIWV_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

namespace miwv::cpu {
namespace {
namespace avx512 {

struct Simd {
  using Float = __m512;
  struct Wide {
    __m512d low, high;
  };
  static constexpr int64_t kGroup = 64;

  MIWV_TARGET MIWV_INLINE static Float broadcast(float value) { return _mm512_set1_ps(value); }
  MIWV_TARGET MIWV_INLINE static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  MIWV_TARGET MIWV_INLINE static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  MIWV_TARGET MIWV_INLINE static Float below(Float x, float limit, Float yes, Float no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), no, yes);
  }
  MIWV_TARGET MIWV_INLINE static Float exponent_from_low_bits(Float x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
  }
  // Of two operands one of which is NaN, the instructions give the second.
  MIWV_TARGET MIWV_INLINE static Float max_or_nan(Float bound, Float x) { return _mm512_max_ps(bound, x); }
  MIWV_TARGET MIWV_INLINE static Float min_or_nan(Float bound, Float x) { return _mm512_min_ps(bound, x); }
  MIWV_TARGET MIWV_INLINE static Float max_but_nan(Float top, Float x) { return _mm512_max_ps(x, top); }

  MIWV_TARGET MIWV_INLINE static void load_pair(const float* p, Float& first, Float& second) {
    first = _mm512_loadu_ps(p);
    second = _mm512_loadu_ps(p + 16);
  }
  // Interleaved within 128 bits, not in memory order; which lane adds which element doesn't matter, so long as it is
  // fixed.
  MIWV_TARGET MIWV_INLINE static void load_pair(const BFloat16* p, Float& first, Float& second) {
    const __m512i packed = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), packed));
    second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), packed));
  }
  MIWV_TARGET MIWV_INLINE static void load_pair(const Float16* p, Float& first, Float& second) {
    first = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    second = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }

  // References are multiples of 1/16 and small enough that all constants made of them are exact.
  MIWV_TARGET MIWV_INLINE static float reference(float top, float c) { return std::rint(top * (16 * c)) / 16; }
  MIWV_TARGET MIWV_INLINE static double base2(float reference, float) { return reference; }
  MIWV_TARGET MIWV_INLINE static bool usable(float reference) { return std::fabs(reference) <= 0x1p13f; }
  template <class T>
  static SoftmaxSum fallback(const T* row, int64_t vocab, const LogitTransform& transform) {
    return generic::row_sum<T>(row, vocab, transform);
  }

  struct Shift {
    Float c, lowest, round, center;
    MIWV_TARGET MIWV_INLINE Shift(float reference, float c)
        : c(broadcast(c)),
          lowest(broadcast((reference - 120) / c)),
          round(broadcast(kRound - reference)),
          center(broadcast(kCenter - reference)) {}
  };
  static constexpr float kRound = 0x1.8p19f;  // a sum with it is rounded to a multiple of 1/16
  static constexpr float kCenter = 739.0f / 512;

  // sum + 2^t for t = c * x - reference = n + f, n a multiple of 1/16 and |f| <= 1/32:
  //
  //   2^t = 2^floor(n) * 2^(n - floor(n)) * 2^f,   2^f = kScale * ((f + kCenter)^2 + kSquare)
  //
  // The minimax square is off by 4.5e-7. Its vertex is near -1/ln 2, so f + kCenter costs nothing: it is t rounded
  // once, with another constant, less n. kScale is in the table of 2^(j/16). scalef flushes to 0 far below and goes to
  // infinity far above; -inf and logits of 1e20 and more come out as NaN unless they are clamped.
  template <bool kMasked>
  MIWV_TARGET MIWV_INLINE static Float add_exp2(Float sum, Float x, const Shift& shift) {
    alignas(64) static constexpr float kPowers[16] = {
        0.240130484f, 0.250761986f, 0.261864156f, 0.273457885f, 0.285564899f, 0.298207909f, 0.311410725f, 0.325198054f,
        0.339595795f, 0.354630977f, 0.370331854f, 0.38672784f,  0.403849721f, 0.421729684f, 0.440401256f, 0.459899485f};
    if (kMasked) x = _mm512_max_ps(shift.lowest, x);
    const Float rounded = _mm512_fmadd_ps(x, shift.c, shift.round);
    const Float n = _mm512_sub_ps(rounded, _mm512_set1_ps(kRound));
    const Float u = _mm512_sub_ps(_mm512_fmadd_ps(x, shift.c, shift.center), n);
    const Float power = _mm512_permutexvar_ps(_mm512_castps_si512(rounded), _mm512_load_ps(kPowers));
    return _mm512_fmadd_ps(_mm512_scalef_ps(power, n), _mm512_fmadd_ps(u, u, _mm512_set1_ps(kSquare)), sum);
  }
  static constexpr float kSquare = 2.081116307801854f;

  MIWV_TARGET MIWV_INLINE static float horizontal_max(Float v) { return _mm512_reduce_max_ps(v); }
  MIWV_TARGET MIWV_INLINE static bool all_at_most(Float v, float limit) {
    return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_NLE_UQ) == 0;
  }
  MIWV_TARGET MIWV_INLINE static bool any_nan(Float v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }

  MIWV_TARGET MIWV_INLINE static Wide wide_zero() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  MIWV_TARGET MIWV_INLINE static Wide scale(Wide a, double factor) {
    return {_mm512_mul_pd(a.low, _mm512_set1_pd(factor)), _mm512_mul_pd(a.high, _mm512_set1_pd(factor))};
  }
  MIWV_TARGET MIWV_INLINE static Wide widen_add(Wide a, Float v) {
    return {_mm512_add_pd(a.low, _mm512_cvtps_pd(_mm512_castps512_ps256(v))),
            _mm512_add_pd(a.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)))};
  }
  MIWV_TARGET MIWV_INLINE static double horizontal_sum(Wide a) {
    return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high));
  }
};

#include "row_sum_inl.h"

}  // namespace avx512
}  // namespace
}  // namespace miwv::cpu

#undef MIWV_TARGET
