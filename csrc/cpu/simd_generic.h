// The vector operations of row_sum_inl.h in the vector extensions of GCC and Clang: SSE2, NEON, or whatever the
// compiler makes of vectors of four floats.
#pragma once

#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../online_softmax.h"
#include "half.h"

#define MIWV_TARGET

namespace miwv::cpu {
namespace {
namespace generic {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the bfloat16 loads take the low half of a word to come first");

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using UInt4 = uint32_t __attribute__((vector_size(16)));
using UShort4 = uint16_t __attribute__((vector_size(8)));
using Double2 = double __attribute__((vector_size(16)));

struct Simd {
  using Float = Float4;
  struct Wide {
    Double2 low, high;
  };
  static constexpr int64_t kGroup = 16;

  MIWV_INLINE static Float broadcast(float value) { return Float{value, value, value, value}; }
  MIWV_INLINE static Float add(Float a, Float b) { return a + b; }
  MIWV_INLINE static Float sub(Float a, Float b) { return a - b; }
  MIWV_INLINE static Float mul(Float a, Float b) { return a * b; }
  MIWV_INLINE static Float div(Float a, Float b) { return a / b; }
  MIWV_INLINE static Float fma(Float a, Float b, Float c) { return a * b + c; }
  MIWV_INLINE static Float below(Float x, float limit, Float yes, Float no) { return x < broadcast(limit) ? yes : no; }
  MIWV_INLINE static Float exponent_from_low_bits(Float x) {
    return reinterpret_cast<Float>(reinterpret_cast<UInt4>(x) << 23);
  }

  template <class To, class From>
  MIWV_INLINE static To load(const From* p) {
    To value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  MIWV_INLINE static void load_pair(const float* p, Float& first, Float& second) {
    first = load<Float>(p);
    second = load<Float>(p + 4);
  }
  MIWV_INLINE static void load_pair(const BFloat16* p, Float& first, Float& second) {
    const auto packed = load<UInt4>(p);
    first = reinterpret_cast<Float>(packed << 16);
    second = reinterpret_cast<Float>(packed & 0xffff0000u);
  }
  MIWV_INLINE static void load_pair(const Float16* p, Float& first, Float& second) {
    first = widen(load<UShort4>(p));
    second = widen(load<UShort4>(p + 4));
  }
  // Shifted into place, the exponent is 112 too small, which a multiplication mends, subnormals included; infinities
  // and NaN get the largest exponent instead.
  MIWV_INLINE static Float widen(UShort4 half) {
    const UInt4 bits = __builtin_convertvector(half, UInt4);
    const UInt4 sign = (bits & 0x8000u) << 16;
    const UInt4 magnitude = (bits & 0x7fffu) << 13;
    const auto finite = reinterpret_cast<UInt4>(reinterpret_cast<Float>(magnitude) * broadcast(0x1p112f));
    const auto special = reinterpret_cast<UInt4>((bits & 0x7c00u) == 0x7c00u);
    return reinterpret_cast<Float>(sign | (finite & ~special) | ((magnitude | 0x7f800000u) & special));
  }

  // The reference is a logit here: without a fused multiply-add, c * x would be rounded at the size of x, and x -
  // top is rounded at its own.
  MIWV_INLINE static float reference(float top, float) { return top; }
  MIWV_INLINE static double base2(float reference, float c) { return reference * static_cast<double>(c); }
  MIWV_INLINE static bool usable(float reference) { return std::fabs(reference) <= 0x1p126f; }
  template <class T>
  static SoftmaxSum fallback(const T* row, int64_t vocab, const LogitTransform& transform) {
    return row_sum_exact(row, vocab, transform);
  }

  struct Shift {
    Float reference, c;
    MIWV_INLINE Shift(float reference, float c) : reference(broadcast(reference)), c(broadcast(c)) {}
  };

  // sum + 2^t for t = c * (x - reference) = n + f, n whole, |f| <= 1/2, and a polynomial for 2^f that is off by 1.6e-7
  // at most. kRound leaves n + 127 in the low bits of `rounded`, which become an exponent by a shift. t is held in
  // [-125, 64], where that can't wrap; NaN passes, because a comparison with it is false, and because the power is
  // multiplied, not added into the bits, where the payload of a NaN could carry.
  template <bool kMasked>
  MIWV_INLINE static Float add_exp2(Float sum, Float x, const Shift& shift) {
    const Float kLow = broadcast(-125), kHigh = broadcast(64), kRound = broadcast(0x1.8p23f + 127);
    const Float t = min_or_nan(kHigh, max_or_nan(kLow, (x - shift.reference) * shift.c));
    const Float rounded = t + kRound;
    const Float f = t - (rounded - kRound);
    const Float square = f * f;  // Estrin's order: the chain of dependent operations is what limits older CPUs
    const Float low = f * broadcast(0.693146944f) + broadcast(1.00000012f);
    const Float middle = f * broadcast(0.0555071309f) + broadcast(0.240221202f);
    const Float high = f * broadcast(0.00132764725f) + broadcast(0.00967554096f);
    const Float p = (high * square + middle) * square + low;
    return p * exponent_from_low_bits(rounded) + sum;
  }

#if defined(__SSE2__)  // what the comparisons below mean, but compilers spend four instructions on them
  MIWV_INLINE static Float max_or_nan(Float bound, Float x) { return _mm_max_ps(bound, x); }
  MIWV_INLINE static Float min_or_nan(Float bound, Float x) { return _mm_min_ps(bound, x); }
#else
  MIWV_INLINE static Float max_or_nan(Float bound, Float x) { return bound > x ? bound : x; }
  MIWV_INLINE static Float min_or_nan(Float bound, Float x) { return bound < x ? bound : x; }
#endif
  MIWV_INLINE static Float max_but_nan(Float top, Float x) { return max_or_nan(x, top); }
  MIWV_INLINE static float horizontal_max(Float v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
  MIWV_INLINE static bool all_at_most(Float v, float limit) {
    return v[0] <= limit && v[1] <= limit && v[2] <= limit && v[3] <= limit;
  }
  MIWV_INLINE static bool any_nan(Float v) { return v[0] != v[0] || v[1] != v[1] || v[2] != v[2] || v[3] != v[3]; }

  MIWV_INLINE static Wide wide_zero() { return {Double2{0, 0}, Double2{0, 0}}; }
  MIWV_INLINE static Wide scale(Wide a, double factor) { return {a.low * factor, a.high * factor}; }
  MIWV_INLINE static Wide widen_add(Wide a, Float v) {
    return {a.low + Double2{v[0], v[1]}, a.high + Double2{v[2], v[3]}};
  }
  MIWV_INLINE static double horizontal_sum(Wide a) {
    const Double2 pair = a.low + a.high;
    return pair[0] + pair[1];
  }
};

#include "row_sum_inl.h"

}  // namespace generic
}  // namespace
}  // namespace miwv::cpu

#undef MIWV_TARGET
