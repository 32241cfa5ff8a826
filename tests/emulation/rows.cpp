// The CUDA row kernels, from their own sources, against float64 and against themselves. The argument names a group of
// checks; a second one puts that relative error on every exp2.
#include "../../csrc/cuda/rows_cuda.cu"
#include "support.h"

namespace {

using namespace support;
using miwv::DifferenceParams;
using miwv::Logits;
using miwv::ResponseParams;
using miwv::TokenParams;
using miwv::cuda::Launch;
using miwv::cuda::Split;

constexpr Split kSplits[] = {Split::kNever, Split::kAlways};

// Scratch memory of just the size asked for, between unmapped pages.
template <class Params, class Function>
void call(Function function, const Params& params, const Logits& logits, int sides, bool per_response, Split split) {
  const int64_t bytes = miwv::cuda::scratch_bytes(logits, params.num_tokens, sides, per_response, 0, split);
  Guarded scratch(bytes, true);
  function(params, Launch{0, nullptr, scratch.data, split});
}

std::vector<float> token_logprobs(const Logits& logits, const std::vector<int64_t>& targets,
                                  const std::vector<int64_t>* rows, Split split) {
  std::vector<float> out(targets.size(), -7.0f);
  const TokenParams params{logits, rows ? rows->data() : nullptr, targets.data(), int64_t(targets.size()), out.data()};
  call(&miwv::cuda::token_logprobs, params, logits, 1, false, split);
  return out;
}

std::vector<float> difference(const Logits& one, const Logits& zero, const std::vector<int64_t>& one_rows,
                              const std::vector<int64_t>& zero_rows, const std::vector<int64_t>& targets,
                              const std::vector<int64_t>& offsets, Split split) {
  std::vector<float> out(offsets.size() - 1, -7.0f);
  const DifferenceParams params{one,
                                zero,
                                one_rows.data(),
                                zero_rows.data(),
                                targets.data(),
                                int64_t(targets.size()),
                                offsets.data(),
                                int64_t(out.size()),
                                out.data()};
  call(&miwv::cuda::response_nll_difference, params, one, 2, true, split);
  return out;
}

std::vector<float> response_nll(const Logits& logits, const std::vector<int64_t>* rows,
                                const std::vector<int64_t>& targets, const std::vector<int64_t>& offsets, Split split) {
  std::vector<float> out(offsets.size() - 1, -7.0f);
  const ResponseParams params{logits,         rows ? rows->data() : nullptr, targets.data(), int64_t(targets.size()),
                              offsets.data(), int64_t(out.size()),           out.data()};
  call(&miwv::cuda::response_nll, params, logits, 1, true, split);
  return out;
}

std::vector<float> combine(const std::vector<miwv::Partial>& partials, const std::vector<miwv::Partial>* minus,
                           int64_t num_slices, const std::vector<int64_t>& offsets) {
  std::vector<float> out(offsets.size() - 1, -7.0f);
  const int64_t num_tokens = int64_t(partials.size()) / num_slices;
  Guarded scratch(2 * num_tokens * sizeof(double), true);
  miwv::cuda::combine_partials({partials.data(), minus ? minus->data() : nullptr, num_slices, num_tokens,
                                offsets.data(), int64_t(out.size()), out.data()},
                               {0, nullptr, scratch.data, Split::kNever});
  return out;
}

std::string label(DType d, int64_t vocab, Split split) {
  return std::string(name(d)) + " V " + std::to_string(vocab) + (split == Split::kAlways ? " split" : "");
}

// 1, fewer than are peeled, a body of one vector and about it, one warp's worth and about it, two slices, real ones
// that are even, odd, and with a short last slice.
constexpr int64_t kVocabs[] = {1, 7, 15, 24, 31, 256, 1000, 2057, 4112, 4127, 8200, 20011, 32001, 50257};

// Every byte of a chosen row is read, none of any other. Once where all rows start on 16 bytes; otherwise neighbouring
// threads may both ask for the 16 bytes that their vectors share. The target is read once more.
void expect_reads(const Matrix& m, const std::vector<int64_t>& rows, const std::vector<int64_t>& targets,
                  const std::string& what) {
  const int64_t size = size_of(m.logits.dtype);
  const char* const data = static_cast<const char*>(m.logits.data);
  const char most = reinterpret_cast<uintptr_t>(data) % 16 || m.logits.row_stride * size % 16 ? 2 : 1;
  std::vector<char> limit(m.bytes, 0);
  std::vector<uint8_t> target(m.bytes, 0);
  for (size_t k = 0; k < rows.size(); ++k) {
    const char* const row = data + rows[k] * m.logits.row_stride * size;
    std::fill_n(limit.begin() + (row - m.memory.data), m.logits.vocab * size, most);
    std::fill_n(target.begin() + (row - m.memory.data) + targets[k] * size, size, 1);
  }
  bool ok = true;
  for (size_t i = 0; i < m.bytes; ++i) {
    const int count = emulation::reads[i] - target[i];
    ok = ok && (limit[i] == 0 ? count == 0 : count >= 1 && count <= limit[i]);
  }
  expect(ok, what + ": reads");
}

void check_values() {
  for (DType d : kTypes)
    for (int64_t vocab : kVocabs)
      for (int64_t padding : {0, 1, 5, 8}) {
        const bool large = vocab > 5000;
        if (large && padding > 1) continue;
        for (int64_t offset : {0, 1, 3, 8, 13}) {
          if (large && offset > 1) continue;
          const int64_t num_rows = large ? 3 : 7;
          Matrix m(d, vocab, num_rows, padding, offset, (padding + offset) % 2 == 0);
          std::vector<int64_t> rows, targets;
          for (int64_t row = num_rows - 1; row >= 0; row -= 1 + (row == 2)) {  // falling; row 1 left out
            rows.push_back(row);
            targets.push_back(row == 0 ? vocab - 1 : row == 2 ? 0 : below(vocab));
          }
          std::vector<float> first;
          for (Split split : kSplits) {
            const std::string what = label(d, vocab, split);
            emulation::watched = m.memory.data;
            emulation::reads.assign(m.bytes, 0);
            const std::vector<float> out = token_logprobs(m.logits, targets, &rows, split);
            expect_reads(m, rows, targets, what);
            emulation::watched = nullptr;
            for (size_t k = 0; k < rows.size(); ++k)
              expect_close(out[k], reference(d, m.logits.data, rows[k] * m.logits.row_stride, vocab, targets[k]), what);
            emulation::reversed = true;
            expect(same_bits(out, token_logprobs(m.logits, targets, &rows, split)), what + ": reversed threads");
            emulation::reversed = false;
            if (split == Split::kNever) first = out;
            expect(same_bits(out, first), what + ": other bits than whole rows");
          }
        }
      }
}

// The same row at every place that its type allows, and among any number of others.
void check_same_bits() {
  std::vector<int64_t> vocabs(std::begin(kVocabs), std::end(kVocabs));
  vocabs.push_back((1 << 20) - 3);  // as many slices as there may be, of two sizes
  for (DType d : kTypes)
    for (int64_t vocab : vocabs) {
      Matrix m(d, vocab, 1, 0, 0, true);
      const int64_t bytes = vocab * size_of(d);
      const std::vector<int64_t> one_target{below(vocab)};
      const std::vector<float> want = token_logprobs(m.logits, one_target, nullptr, Split::kNever);
      expect_close(want[0], reference(d, m.logits.data, 0, vocab, one_target[0]), label(d, vocab, Split::kNever));
      for (int64_t at = 0; at < 16; at += size_of(d)) {
        Guarded memory(bytes + at + 32, false);
        Logits moved = m.logits;
        moved.data = std::memcpy(memory.data + at, m.logits.data, bytes);
        for (Split split : kSplits)
          expect(same_bits(want, token_logprobs(moved, one_target, nullptr, split)),
                 label(d, vocab, split) + " at byte " + std::to_string(at));
      }
      if (vocab > 5000) continue;
      Matrix many(d, vocab, 19, 3, 1, true);
      for (int64_t row : {0, 8, 18}) {
        std::memcpy(const_cast<char*>(static_cast<const char*>(many.logits.data)) + row * (vocab + 3) * size_of(d),
                    m.logits.data, bytes);
        const std::vector<float> out =
            token_logprobs(many.logits, std::vector<int64_t>(19, one_target[0]), nullptr, Split::kFewRows);
        expect(same_bits(want, {out[row]}), label(d, vocab, Split::kNever) + " in row " + std::to_string(row));
      }
    }
}

void check_special_values() {
  struct Case {
    const char* name;
    float (*value)(int64_t i, int64_t vocab, int64_t target, float largest);
  };
  static const Case cases[] = {
      {"all -inf", [](int64_t, int64_t, int64_t, float) { return -INFINITY; }},
      {"one finite, at the end", [](int64_t i, int64_t v, int64_t, float) { return i == v - 1 ? 3 : -INFINITY; }},
      {"NaN first", [](int64_t i, int64_t, int64_t, float) { return i == 0 ? NAN : normal(); }},
      {"NaN amid", [](int64_t i, int64_t v, int64_t, float) { return i == v / 2 ? NAN : normal(); }},
      {"NaN last", [](int64_t i, int64_t v, int64_t, float) { return i == v - 1 ? NAN : normal(); }},
      {"+inf", [](int64_t i, int64_t v, int64_t, float) { return i == v / 2 ? INFINITY : normal(); }},
      {"+inf and -inf",
       [](int64_t i, int64_t v, int64_t, float) { return i == 0       ? INFINITY
                                                         : i == v - 1 ? -INFINITY
                                                                      : normal(); }},
      {"first half -inf",
       [](int64_t i, int64_t v, int64_t t, float) { return i == t || i >= v / 2 ? normal() : -INFINITY; }},
      {"-inf target", [](int64_t i, int64_t, int64_t t, float) { return i == t ? -INFINITY : normal(); }},
      {"all lowest", [](int64_t, int64_t, int64_t, float top) { return -top; }},
      {"all largest", [](int64_t, int64_t, int64_t, float top) { return top; }},
      {"lowest and largest", [](int64_t i, int64_t, int64_t, float top) { return i % 2 ? top : -top; }},
      {"mask of lowest", [](int64_t i, int64_t, int64_t, float top) { return i % 5 ? -top : normal(); }},
      {"rising", [](int64_t i, int64_t, int64_t, float) { return 0.01f * float(i); }},
      {"falling", [](int64_t i, int64_t v, int64_t, float) { return 0.01f * float(v - i); }},
  };
  for (DType d : kTypes)
    for (int64_t vocab : {1, 7, 1000, 20011})
      for (const Case& c : cases)
        for (int64_t offset : {0, 1})
          for (Split split : kSplits) {
            Matrix m(d, vocab, 1, 0, offset, true);
            const int64_t target = vocab / 3;
            for (int64_t i = 0; i < vocab; ++i)
              put(d, const_cast<void*>(m.logits.data), i, c.value(i, vocab, target, largest(d)));
            expect_close(token_logprobs(m.logits, {target}, nullptr, split)[0],
                         reference(d, m.logits.data, 0, vocab, target), label(d, vocab, split) + " " + c.name);
          }
}

// Rows beyond 2^31 elements, falling, repeated, and in two levels.
void check_strides() {
  const DType d = DType::kBFloat16;
  constexpr int64_t kVocab = 999, kStride = (int64_t(1) << 31) + 12345;
  constexpr size_t kBytes = size_t(3 * kStride) * 2;
  void* const memory =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return expect(false, "no address space for 12 GiB");
  for (int64_t row = 0; row < 3; ++row)
    for (int64_t i = 0; i < kVocab + 10; ++i) put(d, memory, row * kStride + i, normal());
  const std::vector<int64_t> targets{5, 6, 7};
  const auto check = [&](const char* what, const Logits& logits, const std::vector<int64_t>& rows) {
    const std::vector<float> out = token_logprobs(logits, targets, &rows, Split::kFewRows);
    const int64_t base = (static_cast<const char*>(logits.data) - static_cast<char*>(memory)) / 2;
    for (size_t k = 0; k < rows.size(); ++k)
      expect_close(out[k], reference(d, memory, base + logits.row_offset(rows[k]), kVocab, targets[k]), what);
  };
  char* const last = static_cast<char*>(memory) + 2 * kStride * 2;
  check("beyond 2^31", {memory, d, 3, kVocab, kStride, 3, 0}, {2, 0, 1});
  check("falling", {last, d, 3, kVocab, -kStride, 3, 0}, {2, 0, 1});
  check("repeated", {memory, d, 3, kVocab, 0, 3, 0}, {2, 0, 1});
  check("overlapping", {memory, d, 10, kVocab, 1, 10, 0}, {9, 0, 5});
  check("two levels", {memory, d, 30, kVocab, 1, 10, kStride}, {29, 0, 15});
  check("two levels, falling", {last, d, 30, kVocab, 1, 10, -kStride}, {29, 0, 15});
  check("two levels, few of them", {memory, d, 6, kVocab, kStride, 3, 1}, {5, 0, 4});
  check("rows on 16 bytes, batches not", {memory, d, 4, kVocab, 1008, 2, kStride}, {3, 0, 2});
  munmap(memory, kBytes);
}

// Responses of no, one, a few and many tokens; rows chosen at random.
void check_responses() {
  for (DType d : kTypes)
    for (int64_t vocab : {7, 1000, 20011}) {
      const int64_t num_tokens = vocab == 7 ? 700 : vocab == 1000 ? 60 : 12;
      Matrix one(d, vocab, 9, 3, 1, true), zero(d, vocab, 7, 8, 0, true);
      std::vector<int64_t> one_rows, zero_rows, targets, offsets{0, 1, 1, 4, num_tokens, num_tokens};
      for (int64_t t = 0; t < num_tokens; ++t) {
        one_rows.push_back(below(9));
        zero_rows.push_back(below(7));
        targets.push_back(below(vocab));
      }
      for (Split split : kSplits) {
        const std::string what = label(d, vocab, split);
        const std::vector<float> nll = response_nll(one.logits, &one_rows, targets, offsets, split);
        const std::vector<float> out =
            difference(one.logits, zero.logits, one_rows, zero_rows, targets, offsets, split);
        emulation::reversed = true;
        expect(same_bits(nll, response_nll(one.logits, &one_rows, targets, offsets, split)), what + ": reversed");
        expect(same_bits(out, difference(one.logits, zero.logits, one_rows, zero_rows, targets, offsets, split)),
               what + ": difference reversed");
        emulation::reversed = false;
        expect(same_bits(nll, response_nll(one.logits, &one_rows, targets, offsets, Split::kNever)) &&
                   same_bits(out,
                             difference(one.logits, zero.logits, one_rows, zero_rows, targets, offsets, Split::kNever)),
               what + ": other bits than whole rows");
        for (size_t b = 0; b + 1 < offsets.size(); ++b) {
          double one_sum = 0, zero_sum = 0;
          for (int64_t t = offsets[b]; t < offsets[b + 1]; ++t) {
            one_sum += reference(d, one.logits.data, one_rows[t] * one.logits.row_stride, vocab, targets[t]);
            zero_sum += reference(d, zero.logits.data, zero_rows[t] * zero.logits.row_stride, vocab, targets[t]);
          }
          const double count = double(offsets[b + 1] - offsets[b]);  // 0 / 0 is NaN, as it should be
          expect_close(nll[b], -one_sum / count, what + " response_nll");
          expect_close(out[b], (zero_sum - one_sum) / count, what + " difference", 2 * kTolerance);
        }
        // At V = 1000 rows of `zero` start on 16 bytes, those of `one` don't: one kernel has to see that of either
        // side.
        const std::vector<float> swapped =
            difference(zero.logits, one.logits, zero_rows, one_rows, targets, offsets, split);
        for (size_t b = 0; b < out.size(); ++b)
          expect(swapped[b] == -out[b] || (out[b] != out[b] && swapped[b] != swapped[b]), what + " swapped");
      }
      // All rows in order, without an index.
      const std::vector<int64_t> nine(9, vocab - 1), in_order{0, 1, 2, 3, 4, 5, 6, 7, 8}, ends{0, 9};
      expect(same_bits(response_nll(one.logits, nullptr, nine, ends, Split::kNever),
                       response_nll(one.logits, &in_order, nine, ends, Split::kNever)),
             "rows in order");
    }
}

// NaN for that token or response, and for no other. Where the logits of bad rows lie, nothing does; behind a bad target
// nothing is read.
void check_bad_indices() {
  const DType d = DType::kBFloat16;
  for (int64_t vocab : {9, 20011})
    for (Split split : kSplits) {
      const Logits nowhere{reinterpret_cast<const void*>(4096), d, 3, vocab, vocab, 3, 0};
      const int64_t beyond = int64_t(1) << 32;  // 0 in 32 bits
      const std::vector<int64_t> bad_rows{-1, 3, beyond, INT64_MIN};
      for (float out : token_logprobs(nowhere, {0, 0, 0, 0}, &bad_rows, split)) expect(out != out, "bad row");
      Matrix m(d, vocab, 4, 0, 0, true);
      const std::vector<int64_t> bad_targets{-100, -1, vocab, vocab + 1, 1 << 30, beyond, INT64_MAX, INT64_MIN};
      const std::vector<int64_t> zeros(bad_targets.size(), 0);
      for (float softcap : {0, 30}) {
        m.logits.transform = {1, softcap};
        emulation::watched = m.memory.data;
        emulation::reads.assign(m.bytes, 0);
        for (float out : token_logprobs(m.logits, bad_targets, &zeros, split)) expect(out != out, "bad target");
        emulation::watched = nullptr;
      }
      m.logits.transform = {};
      const std::vector<int64_t> rows{0, 1, 2, 3}, targets{0, -100, 1, vocab}, offsets{0, 1, 2, 3, 4};
      const std::vector<float> nll = response_nll(m.logits, &rows, targets, offsets, split);
      const std::vector<float> out = difference(m.logits, m.logits, rows, rows, targets, offsets, split);
      expect(nll[0] == nll[0] && nll[1] != nll[1] && nll[2] == nll[2] && nll[3] != nll[3], "bad targets' responses");
      expect(out[0] == 0 && out[1] != out[1] && out[2] == 0 && out[3] != out[3], "bad targets' differences");
      const std::vector<int64_t> good_targets{0, 1, 2, 3}, bad_offsets{-1, 2, 1, 5, INT64_MAX, 4};
      for (float x : response_nll(m.logits, &rows, good_targets, bad_offsets, split)) expect(x != x, "bad offsets");
      expect(token_logprobs({nullptr, d, 0, vocab, vocab, 1, 0}, {}, nullptr, split).empty(), "no tokens");
      expect(response_nll({nullptr, d, 0, vocab, vocab, 1, 0}, nullptr, {}, {0}, split).empty(), "no responses");
      const float empty = response_nll({nullptr, d, 0, vocab, vocab, 1, 0}, nullptr, {}, {0, 0}, split)[0];
      expect(empty != empty, "a response without tokens, and no others");
    }
}

// Rows are split where there are fewer than two for each multiprocessor, and V is more than a slice.
void check_split_choice() {
  for (int64_t vocab : {100, 128256}) {
    const Logits logits{nullptr, DType::kBFloat16, 1, vocab, vocab, 1, 0};
    const auto scratch = [&](int64_t tokens, int sides) {
      return miwv::cuda::scratch_bytes(logits, tokens, sides, false, 0, Split::kFewRows);
    };
    const int64_t few = 2 * emulation::multiprocessors - 2;
    expect((scratch(few, 1) > 0) == (vocab > 5000), "few rows");
    expect((scratch(few / 2, 2) > 0) == (vocab > 5000), "few rows of both sides");
    expect(scratch(few + 2, 1) == 0 && scratch(few / 2 + 1, 2) == 0, "many rows");
  }
}

// Scale and softcap, in whole rows and in split ones, to the same bits.
void check_transforms() {
  for (DType d : kTypes)
    for (int64_t vocab : {1, 31, 1000, 4127, 20011})
      for (const miwv::LogitTransform transform : {miwv::LogitTransform{0.0625f, 0}, {13, 0}, {1, 30}, {0.25f, 2}}) {
        const int64_t num_rows = 5;
        Matrix m(d, vocab, num_rows, 3, 1, true);
        m.logits.transform = transform;
        std::vector<int64_t> targets;
        for (int64_t row = 0; row < num_rows; ++row) targets.push_back(below(vocab));
        const std::vector<float> out = token_logprobs(m.logits, targets, nullptr, Split::kNever);
        expect(same_bits(out, token_logprobs(m.logits, targets, nullptr, Split::kAlways)), "split transforms");
        // tanhf is off by two units in the last place of 1, and a logit that is far away rounds once more.
        const double tolerance = kTolerance + 3e-7 * (transform.softcap > 0 ? transform.softcap : 0);
        for (int64_t row = 0; row < num_rows; ++row)
          expect_close(out[row], reference(d, m.logits.data, row * m.logits.row_stride, vocab, targets[row], transform),
                       label(d, vocab, Split::kNever) + " transformed", tolerance);
      }
}

// A vocabulary cut into slices, each added to the partials of its tokens, and put together: in one go, and as parts.
void check_partials() {
  for (DType d : kTypes)
    for (int64_t vocab : {31, 1000, 20011})
      for (int64_t cuts : {1, 3})
        for (Split split : kSplits)
          for (const miwv::LogitTransform transform : {miwv::LogitTransform{}, {0.5f, 0}, {1, 30}}) {
            const int64_t num_tokens = 9;
            Matrix m(d, vocab, num_tokens, 5, 3, true);
            for (int64_t i = 0; i < vocab / cuts; ++i)  // the first slice of one row is nothing but -inf
              if (cuts > 1 && i != 5) put(d, const_cast<void*>(m.logits.data), 2 * m.logits.row_stride + i, -INFINITY);
            std::vector<int64_t> targets{0, vocab - 1};
            while (int64_t(targets.size()) < num_tokens) targets.push_back(below(vocab));
            std::vector<miwv::Partial> added(num_tokens, {7, 7, 7}), apart;
            for (int64_t cut = 0; cut < cuts; ++cut) {
              const int64_t first = cut * vocab / cuts, end = (cut + 1) * vocab / cuts;
              Logits slice = m.logits;
              slice.data = static_cast<const char*>(m.logits.data) + first * size_of(d);
              slice.vocab = end - first;
              slice.transform = transform;
              std::vector<miwv::Partial> own(num_tokens, {7, 7, 7});
              for (const bool alone : {false, true}) {
                const miwv::PartialParams params{slice,
                                                 nullptr,
                                                 targets.data(),
                                                 num_tokens,
                                                 first,
                                                 alone || cut == 0,
                                                 alone ? own.data() : added.data()};
                call(&miwv::cuda::add_partials, params, slice, 1, false, split);
              }
              for (int64_t t = 0; t < num_tokens; ++t)
                expect((own[t].target == own[t].target) == (first <= targets[t] && targets[t] < end), "whose target");
              apart.insert(apart.end(), own.begin(), own.end());
            }
            std::vector<int64_t> offsets;
            for (int64_t t = 0; t <= num_tokens; ++t) offsets.push_back(t);
            const std::vector<float> one = combine(added, nullptr, 1, offsets),
                                     parts = combine(apart, nullptr, cuts, offsets);
            for (int64_t t = 0; t < num_tokens; ++t) {
              const double want = -reference(d, m.logits.data, t * m.logits.row_stride, vocab, targets[t], transform);
              const double tolerance = 2 * kTolerance + 3e-7 * transform.softcap;
              expect_close(one[t], want, label(d, vocab, split) + " added slices", tolerance);
              expect_close(parts[t], want, label(d, vocab, split) + " slices apart", tolerance);
            }
            for (float x : combine(added, &added, 1, offsets)) expect(x == 0 || x != x, "a difference to itself");
          }
  const std::vector<miwv::Partial> nowhere(2, {0, 1, NAN});
  for (float x : combine(nowhere, nullptr, 1, {0, 1, 2})) expect(x != x, "a target in no slice");
  expect(combine({}, nullptr, 1, {0}).empty(), "no tokens");
}

}  // namespace

int main(int argc, char** argv) {
  static const std::pair<const char*, void (*)()> groups[] = {
      {"values", check_values},      {"same_bits", check_same_bits},   {"special_values", check_special_values},
      {"strides", check_strides},    {"responses", check_responses},   {"bad_indices", check_bad_indices},
      {"split", check_split_choice}, {"transforms", check_transforms}, {"partials", check_partials},
  };
  if (argc > 2) emulation::exp2_error = float(std::atof(argv[2]));
  for (const auto& [name, check] : groups)
    if (argc > 1 && std::string(argv[1]) == name) check();
  std::printf("%ld checks, %ld failures, largest error beyond rounding %.2e\n", checks, failures, worst_error);
  return failures != 0 || checks == 0;
}
