// The few things that differ between a GPU and the emulation in tests/emulation, and the element types.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(MIWV_EMULATION)
#include "emulation.h"
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

namespace miwv::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

struct alignas(16) Vec16 {
  uint32_t word[4];
};

template <class To, class From>
__device__ __forceinline__ To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// ---- Loads

// For logits that one thread alone reads: past L1, so that indices and partial sums stay there.
__device__ __forceinline__ Vec16 load_once(const Vec16* p) {
#if defined(MIWV_EMULATION)
  return *emulation::on_load(p);
#else
  Vec16 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(p));
  return v;
#endif
}

// For logits that the neighbouring thread reads in the same breath: through L1, which gives them to both, and first to
// go from it.
__device__ __forceinline__ Vec16 load_twice(const Vec16* p) {
#if defined(MIWV_EMULATION)
  return *emulation::on_load(p);
#else
  Vec16 v;
  asm("ld.global.nc.L1::evict_first.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
      : "l"(p));
  return v;
#endif
}

template <class T>
__device__ __forceinline__ T load_one(const T* p) {
#if defined(MIWV_EMULATION)
  return *emulation::on_load(p);
#else
  return __ldg(p);
#endif
}

// `value` as it is, but not before `sum`, which is never below 0, is there. Without that, what is done to a value that
// was loaded early moves up to just behind its load, and everything after it waits for memory; ptxas sees no empty asm.
// Where the sum is NaN, so is the result, and a bit of `value` does not matter.
template <class T>
__device__ __forceinline__ T after(T value, float sum) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  return bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(value) | bit_cast<uint32_t>(sum) >> 31));
}

// 2^x in one instruction. Results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(MIWV_EMULATION)
  return emulation::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- Element types. A 32-bit word holds kPerWord elements. The maximum of two words is taken in packed form, which
// halves its cost for 16-bit types; it drops a NaN in favour of a number, and the sum carries the NaN to the result.

struct Float32 {
  using Raw = float;
  static constexpr int kPerWord = 1;
  static __device__ __forceinline__ Raw nan() { return bit_cast<float>(0x7fffffffu); }
  static __device__ __forceinline__ float from_raw(Raw raw) { return raw; }
  static __device__ __forceinline__ float element(uint32_t word, int) { return bit_cast<float>(word); }
  static __device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(fmaxf(bit_cast<float>(a), bit_cast<float>(b)));
  }
};

struct BFloat16 {
  using Raw = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ Raw nan() { return 0x7fff; }
  static __device__ __forceinline__ float from_raw(Raw raw) {
    return bit_cast<float>(static_cast<uint32_t>(raw) << 16);
  }
  static __device__ __forceinline__ float element(uint32_t word, int i) {
    return bit_cast<float>(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__nv_bfloat162>(a), bit_cast<__nv_bfloat162>(b)));
  }
};

struct Float16 {
  using Raw = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ __forceinline__ Raw nan() { return 0x7fff; }
  static __device__ __forceinline__ float from_raw(Raw raw) { return __half2float(bit_cast<__half>(raw)); }
  static __device__ __forceinline__ float element(uint32_t word, int i) {
    return from_raw(static_cast<Raw>(i == 0 ? word : word >> 16));
  }
  static __device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
    return bit_cast<uint32_t>(__hmax2(bit_cast<__half2>(a), bit_cast<__half2>(b)));
  }
};

template <class D>
__device__ __forceinline__ float max_of_word(uint32_t word) {
  if constexpr (D::kPerWord == 1) return D::element(word, 0);
  return fmaxf(D::element(word, 0), D::element(word, 1));
}

}  // namespace miwv::cuda
