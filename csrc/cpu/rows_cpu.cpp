// log p(target) of logits rows and its means over responses.
//
//   log p(t | x) = x[t] - m - log(sum_v exp(x[v] - m)),  m = max_v x[v]
#include "rows_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../check.h"

namespace miwv::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct BFloat16 {
  uint16_t bits;
  operator float() const { return from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const uint32_t exponent = (bits >> 10) & 31, mantissa = bits & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | (mantissa << 13));
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 0x1p-24f;
    return from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  }
};

template <class T>
double row_logprob(const T* row, int64_t vocab, int64_t target) {
  double top = -kInf;
  for (int64_t i = 0; i < vocab; ++i) {
    const double value = row[i];
    if (std::isnan(value)) return kNaN;
    top = std::max(top, value);
  }
  if (std::isinf(top)) return kNaN;
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - top);
  return row[target] - top - std::log(sum);
}

double logprob(const Logits& logits, int64_t row, int64_t target) {
  const int64_t offset = logits.row_offset(row);
  switch (logits.dtype) {
    case DType::kFloat32:
      return row_logprob(static_cast<const float*>(logits.data) + offset, logits.vocab, target);
    case DType::kBFloat16:
      return row_logprob(static_cast<const BFloat16*>(logits.data) + offset, logits.vocab, target);
    case DType::kFloat16:
      return row_logprob(static_cast<const Float16*>(logits.data) + offset, logits.vocab, target);
  }
  MIWV_ASSERT(false);
}

void check_rows(const char* name, const Logits& logits, const int64_t* rows, int64_t num_tokens) {
  if (!rows) {
    // An empty tensor has no address either.
    MIWV_ASSERT(num_tokens == logits.num_rows || num_tokens == 0);
    return;
  }
  for (int64_t t = 0; t < num_tokens; ++t)
    MIWV_CHECK(rows[t] >= 0 && rows[t] < logits.num_rows, name, "[", t, "] is ", rows[t], ", outside [0, ",
               logits.num_rows, "), the rows of the logits");
}

void check_targets(const int64_t* targets, int64_t num_tokens, int64_t vocab) {
  for (int64_t t = 0; t < num_tokens; ++t)
    MIWV_CHECK(targets[t] >= 0 && targets[t] < vocab, "targets[", t, "] is ", targets[t], ", outside [0, ", vocab,
               "), the vocabulary of the logits");
}

void check_offsets(const int64_t* offsets, int64_t num_responses, int64_t num_tokens) {
  MIWV_CHECK(offsets[0] == 0, "offsets[0] is ", offsets[0], ", it must be 0");
  for (int64_t b = 0; b < num_responses; ++b)
    MIWV_CHECK(offsets[b] <= offsets[b + 1], "offsets[", b + 1, "] is ", offsets[b + 1], ", less than offsets[", b,
               "], which is ", offsets[b]);
  MIWV_CHECK(offsets[num_responses] == num_tokens, "offsets[", num_responses, "] is ", offsets[num_responses],
             ", it must be ", num_tokens, ", the number of targets");
}

template <class Work>
void parallel_for(int64_t count, int num_threads, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(num_threads, count));
  std::vector<std::thread> threads;
  for (int64_t part = 1; part < parts; ++part)
    threads.emplace_back([&, part] {
      for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i) work(i);
    });
  for (int64_t i = 0; i < count / parts; ++i) work(i);
  for (auto& thread : threads) thread.join();
}

float mean(const double* values, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) sum += values[t];
  return static_cast<float>(begin < end ? sum / static_cast<double>(end - begin) : kNaN);
}

}  // namespace

void token_logprobs(const TokenParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  parallel_for(p.num_tokens, num_threads, [&](int64_t t) {
    p.out[t] = static_cast<float>(logprob(p.logits, p.rows ? p.rows[t] : t, p.targets[t]));
  });
}

void response_nll(const ResponseParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  std::vector<double> nll(p.num_tokens);
  parallel_for(p.num_tokens, num_threads,
               [&](int64_t t) { nll[t] = -logprob(p.logits, p.rows ? p.rows[t] : t, p.targets[t]); });
  for (int64_t b = 0; b < p.num_responses; ++b) p.out[b] = mean(nll.data(), p.offsets[b], p.offsets[b + 1]);
}

void response_nll_difference(const DifferenceParams& p, int num_threads) {
  check_rows("one_shot_rows", p.one_shot, p.one_shot_rows, p.num_tokens);
  check_rows("zero_shot_rows", p.zero_shot, p.zero_shot_rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, std::min(p.one_shot.vocab, p.zero_shot.vocab));
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  std::vector<double> difference(p.num_tokens);
  parallel_for(p.num_tokens, num_threads, [&](int64_t t) {
    difference[t] = logprob(p.zero_shot, p.zero_shot_rows ? p.zero_shot_rows[t] : t, p.targets[t]) -
                    logprob(p.one_shot, p.one_shot_rows ? p.one_shot_rows[t] : t, p.targets[t]);
  });
  for (int64_t b = 0; b < p.num_responses; ++b) p.out[b] = mean(difference.data(), p.offsets[b], p.offsets[b + 1]);
}

}  // namespace miwv::cpu
