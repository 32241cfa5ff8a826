// log p(target) of logits rows and its means over responses: checks what lies in the data, spreads rows over threads,
// and adds up. Means are sums in double in the order of the tokens, so threads leave no trace in them.
#include "rows_cpu.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../check.h"
#include "row_kernels.h"
#include "threads.h"

namespace miwv::cpu {
namespace {

// A pool thread takes some 5 us to wake, in which one thread reads about 128 KiB: less than four times that isn't
// shared.
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

// The rows of one logits tensor, each giving log p of its token.
class RowReader {
 public:
  RowReader(const Logits& logits, const int64_t* rows, const int64_t* targets)
      : logits_(logits), rows_(rows), targets_(targets), kernel_(row_kernels().logprob(logits.dtype)) {}

  double operator()(int64_t token) const {
    const int64_t offset = logits_.row_offset(rows_ ? rows_[token] : token) * element_size(logits_.dtype);
    return kernel_(static_cast<const char*>(logits_.data) + offset, logits_.vocab, targets_[token]);
  }

  int64_t row_bytes() const { return std::max<int64_t>(1, logits_.vocab * element_size(logits_.dtype)); }

 private:
  const Logits& logits_;
  const int64_t* rows_;
  const int64_t* targets_;
  RowLogprob kernel_;
};

template <class Work>
void for_each_token(int64_t num_tokens, int64_t bytes_per_token, int num_threads, const Work& work) {
  const int64_t useful = std::max<int64_t>(1, num_tokens * bytes_per_token / kBytesPerThread);
  const int64_t threads = std::min<int64_t>(num_threads, useful);
  const int64_t grain = std::min(num_tokens / (threads * kPiecesPerThread), kBytesPerPiece / bytes_per_token);
  parallel_for(num_tokens, std::max<int64_t>(1, grain), static_cast<int>(threads), work);
}

float mean(const double* values, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t t = begin; t < end; ++t) sum += values[t];
  return begin < end ? static_cast<float>(sum / static_cast<double>(end - begin))
                     : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

void token_logprobs(const TokenParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  const RowReader logprob(p.logits, p.rows, p.targets);
  for_each_token(p.num_tokens, logprob.row_bytes(), num_threads,
                 [&](int64_t t) { p.out[t] = static_cast<float>(logprob(t)); });
}

void response_nll(const ResponseParams& p, int num_threads) {
  check_rows("rows", p.logits, p.rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.logits.vocab);
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  const RowReader logprob(p.logits, p.rows, p.targets);
  std::vector<double> nll(p.num_tokens);
  for_each_token(p.num_tokens, logprob.row_bytes(), num_threads, [&](int64_t t) { nll[t] = -logprob(t); });
  for (int64_t b = 0; b < p.num_responses; ++b) p.out[b] = mean(nll.data(), p.offsets[b], p.offsets[b + 1]);
}

void response_nll_difference(const DifferenceParams& p, int num_threads) {
  MIWV_ASSERT(p.one_shot.vocab == p.zero_shot.vocab && p.one_shot.dtype == p.zero_shot.dtype);
  check_rows("one_shot_rows", p.one_shot, p.one_shot_rows, p.num_tokens);
  check_rows("zero_shot_rows", p.zero_shot, p.zero_shot_rows, p.num_tokens);
  check_targets(p.targets, p.num_tokens, p.one_shot.vocab);
  check_offsets(p.offsets, p.num_responses, p.num_tokens);
  const RowReader one_shot(p.one_shot, p.one_shot_rows, p.targets);
  const RowReader zero_shot(p.zero_shot, p.zero_shot_rows, p.targets);
  std::vector<double> difference(p.num_tokens);
  for_each_token(p.num_tokens, one_shot.row_bytes() + zero_shot.row_bytes(), num_threads,
                 [&](int64_t t) { difference[t] = zero_shot(t) - one_shot(t); });
  for (int64_t b = 0; b < p.num_responses; ++b) p.out[b] = mean(difference.data(), p.offsets[b], p.offsets[b + 1]);
}

}  // namespace miwv::cpu
