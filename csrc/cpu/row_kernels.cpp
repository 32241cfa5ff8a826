// The softmax denominator of one row, for three types and every instruction set, in one translation unit: functions
// carry target attributes, so no compiler flag can leak an instruction into code that runs before the choice is made.
#include "row_kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "../check.h"
#include "../online_softmax.h"
#include "half.h"
#include "product.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define MIWV_INLINE inline __attribute__((always_inline))

namespace miwv::cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- Memory

constexpr int64_t kCacheLine = 64;
constexpr int64_t kFetchAhead = 8192;  // bytes

// Into L2, from where the arithmetic hides the rest of the way.
inline void fetch(const void* p) {
  __builtin_prefetch(p, 0, 2);
}

// Behind the kernel's arithmetic Intel's hardware prefetchers fall back: told where to go, bfloat16 is 1.5 times as
// fast, float32 1.3 times (Xeon with AMX). On Zen 3 and 4 that gains nothing.
bool fetches_ahead() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

// For rows that the vector kernels leave alone: +inf, or finite logits near the largest float. Two passes in double.
template <class T>
SoftmaxSum row_sum_exact(const T* row, int64_t vocab, const LogitTransform& transform) {
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t v = 0; v < vocab; ++v) {
    const double x = transform_logit(static_cast<float>(row[v]), transform);
    if (!(x < std::numeric_limits<double>::infinity())) return {0, kNaN};
    top = std::max(top, x);
  }
  if (top == -std::numeric_limits<double>::infinity()) return {0, 0};
  double sum = 0;
  for (int64_t v = 0; v < vocab; ++v) sum += std::exp(transform_logit(static_cast<float>(row[v]), transform) - top);
  return {top, sum};
}

}  // namespace
}  // namespace miwv::cpu

#include "simd_generic.h"
#if defined(__x86_64__)
#include "simd_avx2.h"
#include "simd_avx512.h"
#endif

namespace miwv::cpu {
namespace {

#define MIWV_ROW_KERNELS(name, isa) \
  {name, isa::row_sum<float>, isa::row_sum<BFloat16>, isa::row_sum<Float16>, isa::read}

// Least first.
constexpr RowKernels kRowKernels[] = {
    MIWV_ROW_KERNELS("generic", generic),
#if defined(__x86_64__)
    MIWV_ROW_KERNELS("avx2", avx2),           // with fma and f16c
    MIWV_ROW_KERNELS("avx512", avx512),       // with dq, bw and vl
    MIWV_ROW_KERNELS("avx512_bf16", avx512),  // with products by vectors,
    MIWV_ROW_KERNELS("amx", avx512),          // or by tiles, in product.cpp
#endif
};

#if defined(__x86_64__)
// Not every Clang knows f16c in __builtin_cpu_supports. Whether the system saves the registers is asked with avx2.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool supported(const RowKernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (kernels.isa == std::string("avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (kernels.isa == std::string("avx512")) return avx512;
  if (kernels.isa == std::string("avx512_bf16")) return avx512 && bf16_supported();
  if (kernels.isa == std::string("amx")) return avx512 && bf16_supported() && amx_supported();
#endif
  return kernels.isa == std::string("generic");
}

const RowKernels& find(const std::string& isa) {
  std::string names;
  for (const auto& kernels : kRowKernels) {
    if (!supported(kernels)) continue;
    if (kernels.isa == isa) return kernels;
    names += names.empty() ? "" : ", ";
    names += kernels.isa;
  }
  throw std::invalid_argument(concat("instruction set '", isa, "' is not among those of this CPU and build: ", names));
}

const RowKernels& initial() {
  if (const char* forced = std::getenv("MIWV_ISA"); forced && *forced) {
    try {
      return find(forced);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(concat("environment variable MIWV_ISA: ", error.what()));
    }
  }
  return find(available_isas().back());
}

std::atomic<const RowKernels*>& current() {
  static std::atomic<const RowKernels*> kernels{&initial()};
  return kernels;
}

}  // namespace

const RowKernels& row_kernels() {
  return *current().load(std::memory_order_relaxed);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto& kernels : kRowKernels)
    if (supported(kernels)) names.emplace_back(kernels.isa);
  return names;
}

void select_isa(const std::string& name) {
  current().store(&find(name), std::memory_order_relaxed);
}

}  // namespace miwv::cpu
