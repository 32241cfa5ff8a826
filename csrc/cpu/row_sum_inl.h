// The softmax denominator of one row:
//
//   sum_v 2^(c * x[v] - r),  2^r near exp of the largest logit of the first block, raised when a block overflows
//
// Included once per instruction set, inside its namespace, after MIWV_TARGET and Simd are defined: a template can't
// give its functions the target attribute of its argument.
//
// There is no pass for the maximum: any r is exact as long as no exponential overflows. The first block is scanned,
// which leaves it in the L1 cache, and a block that overflows is done again with its own maximum. An element costs
// sizeof(T) bytes from memory and 9 (AVX-512), 12 (AVX2) or 22 (no fused multiply-add) operations, and about 25 more
// with a softcap. A scale costs nothing, nor accuracy: c is kLog2E times it. Element v goes to a lane given by v mod
// kGroup, and blocks are added in order, so the result depends on the values and V alone. Lanes are summed in float
// within a block and in double between blocks: at most kBlock / kGroup float additions meet in one lane, however long
// the row.

// ---- A softcap for vectors

struct Plain {
  MIWV_TARGET MIWV_INLINE Simd::Float operator()(Simd::Float x) const { return x; }
};

struct Capped {
  Simd::Float inner, softcap;
  MIWV_TARGET MIWV_INLINE explicit Capped(const LogitTransform& t)
      : inner(Simd::broadcast(t.scale / t.softcap)), softcap(Simd::broadcast(t.softcap)) {}
  MIWV_TARGET MIWV_INLINE Simd::Float operator()(Simd::Float x) const {
    return Simd::mul(softcap, tanh(Simd::mul(x, inner)));
  }

  // 1 - 2 / (exp(2y) + 1), and near 0, where that would cancel, an odd polynomial (Cephes, tanhf); off by 2e-7 of the
  // result at most.
  MIWV_TARGET MIWV_INLINE static Simd::Float tanh(Simd::Float y) {
    const Simd::Float one = Simd::broadcast(1);
    const Simd::Float far = Simd::add(one, Simd::div(Simd::broadcast(-2), Simd::add(exp_twice(y), one)));
    const Simd::Float z = Simd::mul(y, y);
    Simd::Float p = Simd::fma(Simd::broadcast(-5.70498872745e-3f), z, Simd::broadcast(2.06390887954e-2f));
    p = Simd::fma(p, z, Simd::broadcast(-5.37397155531e-2f));
    p = Simd::fma(p, z, Simd::broadcast(1.33314422036e-1f));
    p = Simd::fma(p, z, Simd::broadcast(-3.33332819422e-1f));
    return Simd::below(z, 0.625f * 0.625f, Simd::fma(Simd::mul(p, z), y, y), far);
  }

  // exp(2y) for y in [-10, 10], to which it is held: beyond, tanh is -1 or 1. 2^t = 2^n * 2^f as in simd_generic.h.
  MIWV_TARGET MIWV_INLINE static Simd::Float exp_twice(Simd::Float y) {
    const Simd::Float bias = Simd::broadcast(0x1.8p23f + 127), limit = Simd::broadcast(20 * kLog2E);
    const Simd::Float t = Simd::min_or_nan(
        limit, Simd::max_or_nan(Simd::broadcast(-20 * kLog2E), Simd::mul(y, Simd::broadcast(2 * kLog2E))));
    const Simd::Float rounded = Simd::add(t, bias);
    const Simd::Float f = Simd::sub(t, Simd::sub(rounded, bias));
    Simd::Float p = Simd::fma(Simd::broadcast(0.00132764725f), f, Simd::broadcast(0.00967554096f));
    p = Simd::fma(p, f, Simd::broadcast(0.0555071309f));
    p = Simd::fma(p, f, Simd::broadcast(0.240221202f));
    p = Simd::fma(p, f, Simd::broadcast(0.693146944f));
    p = Simd::fma(p, f, Simd::broadcast(1.00000012f));
    return Simd::mul(p, Simd::exponent_from_low_bits(rounded));
  }
};

// ---- Blocks

template <class Map, class T>
MIWV_TARGET MIWV_INLINE float block_max(const T* block, int64_t groups, const Map& map) {
  Simd::Float top0 = Simd::broadcast(-__builtin_inff()), top1 = top0;
  for (int64_t i = 0; i < groups * Simd::kGroup; i += Simd::kGroup / 2) {
    Simd::Float first, second;
    Simd::load_pair(block + i, first, second);
    top0 = Simd::max_but_nan(top0, map(first));
    top1 = Simd::max_but_nan(top1, map(second));
  }
  return Simd::horizontal_max(Simd::max_but_nan(top0, top1));
}

// kMasked: the block may hold -inf, or finite logits that stand for it. kAhead: as many bytes are fetched from `ahead`.
template <bool kMasked, bool kAhead, class Map, class T>
MIWV_TARGET MIWV_INLINE Simd::Float block_sum(const T* block, int64_t groups, const Map& map, float reference, float c,
                                              const T* ahead) {
  const Simd::Shift shift(reference, c);
  Simd::Float sum0 = Simd::broadcast(0), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t i = 0; i < groups * Simd::kGroup; i += Simd::kGroup) {
    if (kAhead)
      for (int64_t v = 0; v < Simd::kGroup; v += kCacheLine / sizeof(T)) fetch(ahead + i + v);
    Simd::Float x0, x1, x2, x3;
    Simd::load_pair(block + i, x0, x1);
    Simd::load_pair(block + i + Simd::kGroup / 2, x2, x3);
    sum0 = Simd::add_exp2<kMasked>(sum0, map(x0), shift);
    sum1 = Simd::add_exp2<kMasked>(sum1, map(x1), shift);
    sum2 = Simd::add_exp2<kMasked>(sum2, map(x2), shift);
    sum3 = Simd::add_exp2<kMasked>(sum3, map(x3), shift);
  }
  return Simd::add(Simd::add(sum0, sum1), Simd::add(sum2, sum3));
}

// ---- Rows

struct RunningSum {
  Simd::Wide total;
  float reference;
  bool has_reference, masked;
};

enum class Step { kAdded, kNotANumber, kBeyondReference };

template <bool kAhead, class Map, class T>
MIWV_TARGET MIWV_INLINE Step add_block(RunningSum& row, const T* block, int64_t groups, const Map& map, float c,
                                       const T* ahead) {
  // A lane above this asks for a higher reference. Below it, exponents are at most 30, and rounding one costs 2^-20.
  constexpr float kOverflow = 0x1p30f;
  if (!row.has_reference) {
    const float top = block_max(block, groups, map);
    row.has_reference = top > -__builtin_inff();
    row.masked |= !row.has_reference;
    if (row.has_reference) row.reference = Simd::reference(top, c);
    if (!Simd::usable(row.reference)) return Step::kBeyondReference;
  }
  Simd::Float sum = row.masked ? block_sum<true, kAhead>(block, groups, map, row.reference, c, ahead)
                               : block_sum<false, kAhead>(block, groups, map, row.reference, c, ahead);
  if (__builtin_expect(!Simd::all_at_most(sum, kOverflow), 0)) {
    row.masked |= Simd::any_nan(sum);
    const float raised = Simd::reference(block_max(block, groups, map), c);
    if (raised > row.reference) {
      if (!Simd::usable(raised)) return Step::kBeyondReference;
      row.total = Simd::scale(row.total, std::exp2(Simd::base2(row.reference, c) - Simd::base2(raised, c)));
      row.reference = raised;
    }
    sum = block_sum<true, false>(block, groups, map, row.reference, c, block);
    if (Simd::any_nan(sum)) return Step::kNotANumber;
  }
  if (row.has_reference) row.total = Simd::widen_add(row.total, sum);
  return Step::kAdded;
}

template <bool kAhead, class Map, class T>
MIWV_TARGET SoftmaxSum mapped_row_sum(const T* values, int64_t vocab, const LogitTransform& transform, const Map& map,
                                      float scale) {
  constexpr int64_t kBlock = 16 * Simd::kGroup;
  const float c = kLog2E * scale;
  RunningSum row{Simd::wide_zero(), 0, false, false};
  const int64_t whole = vocab / Simd::kGroup * Simd::kGroup;
  Step step = Step::kAdded;
  for (int64_t begin = 0; begin < whole && step == Step::kAdded; begin += kBlock) {
    constexpr int64_t kDistance = kFetchAhead / sizeof(T);
    const T* const block = values + begin;
    const T* const ahead = begin + kBlock + kDistance <= whole ? block + kDistance : block;  // the row ends before that
    step = add_block<kAhead>(row, block, std::min(kBlock, whole - begin) / Simd::kGroup, map, c, ahead);
  }
  if (whole < vocab && step == Step::kAdded) {
    alignas(64) float tail[Simd::kGroup];
    std::fill(tail, tail + Simd::kGroup, -__builtin_inff());
    const LogitTransform cap{transform.scale / scale, transform.softcap};
    for (int64_t v = whole; v < vocab; ++v)
      tail[v - whole] = static_cast<float>(transform_logit(static_cast<float>(values[v]), cap));
    row.masked = true;
    step = add_block<false>(row, tail, 1, Plain(), c, tail);
  }
  if (step == Step::kBeyondReference) return Simd::fallback(values, vocab, transform);
  if (step == Step::kNotANumber) return {0, kNaN};
  if (!row.has_reference) return {0, 0};
  const double max = Simd::base2(row.reference, c) / static_cast<double>(c) * scale;
  return {max, Simd::horizontal_sum(row.total)};
}

template <class T>
MIWV_TARGET SoftmaxSum row_sum(const void* row, int64_t vocab, const LogitTransform& transform) {
  const T* values = static_cast<const T*>(row);
  if (transform.softcap > 0) return mapped_row_sum<false>(values, vocab, transform, Capped(transform), 1);
  if (fetches_ahead()) return mapped_row_sum<true>(values, vocab, transform, Plain(), transform.scale);
  return mapped_row_sum<false>(values, vocab, transform, Plain(), transform.scale);
}

// What the kernel above would cost if it only read. Without arithmetic between them the loads outrun any hardware
// prefetcher, so this one is told where to go.
MIWV_TARGET double read(const void* data, int64_t bytes) {
  const float* values = static_cast<const float*>(data);
  Simd::Float sum0 = Simd::broadcast(0), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t i = 0; i + Simd::kGroup <= bytes / 4; i += Simd::kGroup) {
    for (int64_t line = 0; line < 4 * Simd::kGroup; line += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kFetchAhead + line);
    Simd::Float x0, x1, x2, x3;
    Simd::load_pair(values + i, x0, x1);
    Simd::load_pair(values + i + Simd::kGroup / 2, x2, x3);
    sum0 = Simd::add(sum0, x0);
    sum1 = Simd::add(sum1, x1);
    sum2 = Simd::add(sum2, x2);
    sum3 = Simd::add(sum3, x3);
  }
  const Simd::Float sum = Simd::add(Simd::add(sum0, sum1), Simd::add(sum2, sum3));
  return Simd::horizontal_sum(Simd::widen_add(Simd::wide_zero(), sum));
}
