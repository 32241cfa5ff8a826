// log p(target) of logits rows and its means over responses: checks what lies in the data, spreads rows over threads,
// and adds up. Means are sums in double in the order of the tokens, so threads leave no trace in them.
#include "rows_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../check.h"
#include "../online_softmax.h"
#include "half.h"
#include "row_kernels.h"
#include "threads.h"

namespace miwv::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A pool thread takes some 5 us to wake, in which one thread reads about 128 KiB: none is woken for less than four
// times that.
constexpr int64_t kBytesPerThread = 512 << 10;
// Neighbouring rows go to one thread, as far as enough pieces are left to even out the ends: at the start of a row that
// doesn't follow the one before, the hardware prefetcher has to find its feet again.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kBytesPerPiece = 4 << 20;

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
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

double read_logit(const void* row, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(row)[index];
    case DType::kBFloat16:
      return static_cast<float>(static_cast<const BFloat16*>(row)[index]);
    case DType::kFloat16:
      return static_cast<float>(static_cast<const Float16*>(row)[index]);
  }
  MIWV_ASSERT(false);
}

// The rows of one logits tensor, as the tokens need them.
class RowReader {
 public:
  RowReader(const Logits& logits, const int64_t* rows)
      : logits_(logits), rows_(rows), row_sum_(row_kernels().row_sum(logits.dtype)) {}

  double logprob(int64_t token, int64_t target) const {
    const void* const row = find(token);
    return log_probability(row_sum_(row, logits_.vocab, logits_.transform), logit(row, target));
  }

  Partial partial(int64_t token, int64_t target) const {
    const void* const row = find(token);
    const SoftmaxSum sum = row_sum_(row, logits_.vocab, logits_.transform);
    return {sum.max, sum.sum, 0 <= target && target < logits_.vocab ? logit(row, target) : kNaN};
  }

  int64_t row_bytes() const { return std::max<int64_t>(1, logits_.vocab * element_size(logits_.dtype)); }

 private:
  const void* find(int64_t token) const {
    const int64_t offset = logits_.row_offset(rows_ ? rows_[token] : token) * element_size(logits_.dtype);
    return static_cast<const char*>(logits_.data) + offset;
  }
  double logit(const void* row, int64_t index) const {
    return transform_logit(read_logit(row, logits_.dtype, index), logits_.transform);
  }

  const Logits& logits_;
  const int64_t* rows_;
  RowSum row_sum_;
};

template <class Work>
void for_each_token(int64_t num_tokens, int64_t bytes_per_token, int num_threads, const Work& work) {
  const int64_t useful = std::max<int64_t>(1, num_tokens * bytes_per_token / kBytesPerThread);
  const int64_t threads = std::min<int64_t>(num_threads, useful);
  const int64_t grain = std::min(num_tokens / (threads * kPiecesPerThread), kBytesPerPiece / bytes_per_token);
  parallel_for(num_tokens, std::max<int64_t>(1, grain), static_cast<int>(threads), work);
}

void write_means(const double* values, const int64_t* offsets, int64_t num_responses, float* out) {
  for (int64_t b = 0; b < num_responses; ++b) {
    double sum = 0;
    for (int64_t t = offsets[b]; t < offsets[b + 1]; ++t) sum += values[t];
    const int64_t count = offsets[b + 1] - offsets[b];
    out[b] = static_cast<float>(count > 0 ? sum / static_cast<double>(count) : kNaN);
  }
}

double combine_slices(const Partial* partials, int64_t num_slices, int64_t num_tokens, int64_t token) {
  SoftmaxSum sum{0, 0};
  double target = kNaN;
  for (int64_t s = 0; s < num_slices; ++s) {
    const Partial& slice = partials[s * num_tokens + token];
    sum = combine(sum, {slice.max, slice.sum});
    if (!std::isnan(slice.target)) target = slice.target;
  }
  MIWV_CHECK(!std::isnan(target) || std::isnan(sum.sum), "no slice of the partials holds the target of token ", token,
             "; they must cover the vocabulary");
  return log_probability(sum, target);
}

}  // namespace

void token_logprobs(const TokenParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  const RowReader reader(p.logits, p.rows);
  for_each_token(p.num_tokens, reader.row_bytes(), num_threads,
                 [&](int64_t t) { p.out[t] = static_cast<float>(reader.logprob(t, p.targets[t])); });
}

void response_nll(const ResponseParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  const RowReader reader(p.logits, p.rows);
  std::vector<double> nll(p.num_tokens);
  for_each_token(p.num_tokens, reader.row_bytes(), num_threads,
                 [&](int64_t t) { nll[t] = -reader.logprob(t, p.targets[t]); });
  write_means(nll.data(), p.offsets, p.num_responses, p.out);
}

void response_nll_difference(const DifferenceParams& p, int num_threads) {
  MIWV_ASSERT(p.one_shot.vocab == p.zero_shot.vocab && p.one_shot.dtype == p.zero_shot.dtype);
  check_rows("one_shot_rows", p.one_shot, p.one_shot_rows, p.num_tokens);
  check_rows("zero_shot_rows", p.zero_shot, p.zero_shot_rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.one_shot.vocab);
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  const RowReader one_shot(p.one_shot, p.one_shot_rows);
  const RowReader zero_shot(p.zero_shot, p.zero_shot_rows);
  std::vector<double> difference(p.num_tokens);
  for_each_token(p.num_tokens, one_shot.row_bytes() + zero_shot.row_bytes(), num_threads, [&](int64_t t) {
    difference[t] = zero_shot.logprob(t, p.targets[t]) - one_shot.logprob(t, p.targets[t]);
  });
  write_means(difference.data(), p.offsets, p.num_responses, p.out);
}

void add_partials(const PartialParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  const RowReader reader(p.logits, p.rows);
  for_each_token(p.num_tokens, reader.row_bytes(), num_threads, [&](int64_t t) {
    const Partial slice = reader.partial(t, p.targets[t] - p.first);
    Partial& whole = p.partials[t];
    if (p.begin) {
      whole = slice;
      return;
    }
    const SoftmaxSum sum = combine({whole.max, whole.sum}, {slice.max, slice.sum});
    whole = {sum.max, sum.sum, std::isnan(slice.target) ? whole.target : slice.target};
  });
}

void combine_partials(const CombineParams& p) {
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  std::vector<double> nll(p.num_tokens);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    nll[t] = -combine_slices(p.partials, p.num_slices, p.num_tokens, t);
    if (p.minus) nll[t] += combine_slices(p.minus, p.num_slices, p.num_tokens, t);
  }
  write_means(nll.data(), p.offsets, p.num_responses, p.out);
}

}  // namespace miwv::cpu
