// What the emulated checks share: guarded memory, logits of each type, the float64 reference, and counting.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/rows_cuda.h"

namespace support {

using miwv::DType;
using miwv::Logits;

inline long checks = 0, failures = 0;
inline double worst_error = 0;  // beyond half a unit in the last place of the result

inline void expect(bool ok, const std::string& what) {
  ++checks;
  if (!ok && ++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

// Memory of exactly this many bytes, with an unmapped page right behind it, or right before it.
class Guarded {
 public:
  Guarded(size_t bytes, bool flush_with_end) {
    const size_t page = sysconf(_SC_PAGESIZE), inside = (bytes + page - 1) / page * page;
    total_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, inside, PROT_READ | PROT_WRITE)) std::abort();
    data = base_ + page + (flush_with_end ? inside - bytes : 0);
    std::memset(data, 0xff, bytes);
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data;

 private:
  char* base_;
  size_t total_;
};

// ---- Logits of each type

constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
inline const char* name(DType d) {
  return d == DType::kFloat32 ? "float32" : d == DType::kBFloat16 ? "bfloat16" : "float16";
}
inline int64_t size_of(DType d) {
  return d == DType::kFloat32 ? 4 : 2;
}
inline float largest(DType d) {
  return d == DType::kFloat32 ? 3.4028234664e38f : d == DType::kBFloat16 ? 3.3895313893e38f : 65504.0f;
}

inline void put(DType d, void* data, int64_t i, float value) {
  if (d == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
    return;
  }
  if (d == DType::kBFloat16)
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(data)[i] = __float2half(value);
}

inline double get(DType d, const void* data, int64_t i) {
  if (d == DType::kFloat32) return static_cast<const float*>(data)[i];
  if (d == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

// ---- The reference: log_softmax in float64, of a row that begins at element `base`

inline double reference(DType d, const void* data, int64_t base, int64_t vocab, int64_t target,
                        const miwv::LogitTransform& transform = {}) {
  const auto logit = [&](int64_t i) { return miwv::transform_logit(get(d, data, base + i), transform); };
  double top = -INFINITY, sum = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const double x = logit(i);
    if (x != x) return NAN;
    top = std::max(top, x);
  }
  if (std::isinf(top)) return NAN;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(logit(i) - top);
  return logit(target) - top - std::log(sum);
}

// Rounding to float32, and: ex2.approx 2^-22; an argument of up to ln V = 14 rounded twice, 14 * 2^-23; the logarithm,
// up to 14, and the few dozen additions on the way, a unit each.
constexpr double kTolerance = 4e-6;

inline void expect_close(float got, double want, const std::string& what, double tolerance = kTolerance) {
  if (want != want || std::isinf(static_cast<float>(want)))
    return expect(want != want ? got != got : got == static_cast<float>(want), what);
  const float rounded = std::fabs(static_cast<float>(want));
  const double error = std::fabs(got - want) - 0.5 * (std::nextafterf(rounded, INFINITY) - rounded);
  expect(error <= tolerance, what + ": " + std::to_string(got) + ", not " + std::to_string(want));
  worst_error = std::max(worst_error, error);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

inline std::mt19937_64& random_bits() {
  static std::mt19937_64 generator(7);
  return generator;
}
inline float normal() {
  static std::normal_distribution<float> distribution;
  return distribution(random_bits());
}
inline int64_t below(int64_t n) {
  return static_cast<int64_t>(random_bits()() % static_cast<uint64_t>(n));
}

// A matrix that ends, or begins, at unmapped memory, with NaN between its rows.
struct Matrix {
  Matrix(DType d, int64_t vocab, int64_t num_rows, int64_t padding, int64_t offset, bool flush_with_end)
      : bytes((offset + (num_rows - 1) * (vocab + padding) + vocab) * size_of(d)),
        memory(bytes, flush_with_end),
        logits{memory.data + offset * size_of(d), d, num_rows, vocab, vocab + padding, num_rows, 0} {
    for (int64_t row = 0; row < num_rows; ++row) {
      const float scale = row % 3 == 1 ? 10 : 2, shift = row % 4 == 2 ? 200 : row % 4 == 3 ? -300 : 0;
      for (int64_t i = 0; i < vocab; ++i)
        put(d, memory.data, offset + row * (vocab + padding) + i, normal() * scale + shift);
    }
  }
  size_t bytes;
  Guarded memory;
  Logits logits;
};

}  // namespace support
