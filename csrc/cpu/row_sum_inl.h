// The softmax denominator of one row:
//
//   sum_v 2^(kLog2E * x[v] - r),  2^r near exp of the largest logit of the first block, raised when a block overflows
//
// Included once per instruction set, inside its namespace, after MIWV_TARGET and Simd are defined: a template can't
// give its functions the target attribute of its argument.
//
// There is no pass for the maximum: any r is exact as long as no exponential overflows. The first block is scanned,
// which leaves it in the L1 cache, and a block that overflows is done again with its own maximum. An element costs
// sizeof(T) bytes from memory and 9 (AVX-512), 12 (AVX2) or 22 (no fused multiply-add) operations. Element v goes to a
// lane given by v mod kGroup, and blocks are added in order, so the result depends on the values and V alone. Lanes are
// summed in float within a block and in double between blocks: at most kBlock / kGroup float additions meet in one
// lane, however long the row.

template <class T>
MIWV_TARGET MIWV_INLINE float block_max(const T* block, int64_t groups) {
  Simd::Float top0 = Simd::broadcast(-__builtin_inff()), top1 = top0;
  for (int64_t i = 0; i < groups * Simd::kGroup; i += Simd::kGroup / 2) {
    Simd::Float first, second;
    Simd::load_pair(block + i, first, second);
    top0 = Simd::max_but_nan(top0, first);
    top1 = Simd::max_but_nan(top1, second);
  }
  return Simd::horizontal_max(Simd::max_but_nan(top0, top1));
}

// kMasked: the block may hold -inf, or finite logits that stand for it.
template <bool kMasked, class T>
MIWV_TARGET MIWV_INLINE Simd::Float block_sum(const T* block, int64_t groups, float reference) {
  const Simd::Shift shift(reference);
  Simd::Float sum0 = Simd::broadcast(0), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t i = 0; i < groups * Simd::kGroup; i += Simd::kGroup) {
    Simd::Float x0, x1, x2, x3;
    Simd::load_pair(block + i, x0, x1);
    Simd::load_pair(block + i + Simd::kGroup / 2, x2, x3);
    sum0 = Simd::add_exp2<kMasked>(sum0, x0, shift);
    sum1 = Simd::add_exp2<kMasked>(sum1, x1, shift);
    sum2 = Simd::add_exp2<kMasked>(sum2, x2, shift);
    sum3 = Simd::add_exp2<kMasked>(sum3, x3, shift);
  }
  return Simd::add(Simd::add(sum0, sum1), Simd::add(sum2, sum3));
}

template <class T>
MIWV_TARGET SoftmaxSum row_sum(const T* row, int64_t vocab) {
  constexpr int64_t kBlock = 16 * Simd::kGroup;
  // A lane above this asks for a higher reference. Below it, exponents are at most 30, and rounding one costs 2^-20.
  constexpr float kOverflow = 0x1p30f;

  Simd::Wide total = Simd::wide_zero();
  alignas(64) T tail[Simd::kGroup];
  float reference = 0;
  bool has_reference = false;
  bool masked = false;
  for (int64_t begin = 0; begin < vocab;) {
    const T* block = row + begin;
    int64_t groups = std::min(kBlock, vocab - begin) / Simd::kGroup;
    if (groups == 0) {
      std::fill(tail, tail + Simd::kGroup, minus_infinity<T>());
      std::copy(block, row + vocab, tail);
      block = tail;
      groups = 1;
      masked = true;
    }
    begin += groups * Simd::kGroup;

    if (!has_reference) {
      const float top = block_max(block, groups);
      has_reference = top > -__builtin_inff();
      masked |= !has_reference;
      if (has_reference) reference = Simd::reference(top);
      if (!Simd::usable(reference)) return Simd::fallback(row, vocab);
    }
    Simd::Float sum = masked ? block_sum<true>(block, groups, reference) : block_sum<false>(block, groups, reference);
    if (__builtin_expect(!Simd::all_at_most(sum, kOverflow), 0)) {
      masked |= Simd::any_nan(sum);
      const float raised = Simd::reference(block_max(block, groups));
      if (raised > reference) {
        if (!Simd::usable(raised)) return Simd::fallback(row, vocab);
        total = Simd::scale(total, std::exp2(Simd::base2(reference) - Simd::base2(raised)));
        reference = raised;
      }
      sum = block_sum<true>(block, groups, reference);
      if (Simd::any_nan(sum)) return {0, kNaN};
    }
    if (has_reference) total = Simd::widen_add(total, sum);
  }
  return {Simd::base2(reference), has_reference ? Simd::horizontal_sum(total) : kNaN};
}

template <class T>
MIWV_TARGET double row_logprob(const void* row, int64_t vocab, int64_t target) {
  const T* values = static_cast<const T*>(row);
  return log_probability(row_sum(values, vocab), static_cast<double>(static_cast<float>(values[target])));
}

// What the kernel above would cost if it only read. Without arithmetic between them the loads outrun the hardware
// prefetcher, so this one is told where to go; the kernel gains nothing from that.
MIWV_TARGET double read(const void* data, int64_t bytes) {
  const float* values = static_cast<const float*>(data);
  Simd::Float sum0 = Simd::broadcast(0), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  for (int64_t i = 0; i + Simd::kGroup <= bytes / 4; i += Simd::kGroup) {
    constexpr int64_t kAhead = 8192, kCacheLine = 64;
    for (int64_t line = 0; line < 4 * Simd::kGroup; line += kCacheLine)
      __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kAhead + line);
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
