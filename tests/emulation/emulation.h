// Runs CUDA kernels compiled by a C++ compiler: a fibre for every thread, one block at a time, in step only where the
// kernel says so (__syncthreads, __shfl_*_sync). It finds wrong indices, reads of memory that is not ours, missing or
// diverging barriers and dependence on the order of threads and blocks; it cannot find races within a warp's step, and
// says nothing about speed, about what ex2.approx really rounds to, or about the assembly that it replaces.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <cuda_runtime_api.h>
#include <vector_types.h>

#undef __global__
#undef __device__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __global__
#define __device__
#define __shared__ static __attribute__((section("emulated_shared")))
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline

extern char __start_emulated_shared, __stop_emulated_shared;

namespace emulation {

constexpr unsigned kMaxThreads = 1024;

inline dim3 thread_index, block_index, grid_size;
inline unsigned current;           // thread of the block
inline bool reversed = false;      // blocks and threads run in falling order: no result may depend on it
inline float exp2_error = 0.0f;    // relative error put on every exp2, to model ex2.approx at its worst (2^-22)
inline int multiprocessors = 132;  // what cudaDeviceGetAttribute says

[[noreturn]] inline void fail(const char* what) {
  std::printf("emulation: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

// ---- Fibres. They live as long as the program; makecontext only starts them, then _longjmp switches without a system
// call.

struct Fibre {
  ucontext_t context;
  jmp_buf at;
  bool started = false;
  std::vector<char> stack;
};

enum Wait : char { kRunning, kBarrier, kShuffleOut, kShuffleIn };

inline std::vector<Fibre> fibres(kMaxThreads);
inline jmp_buf scheduler;
inline std::vector<char> done, waits;
inline unsigned char exchange[kMaxThreads][16];
inline const std::function<void()>* body;

inline void leave() {
  if (!_setjmp(fibres[current].at)) _longjmp(scheduler, 1);
}

inline void wait_for_others(Wait kind) {
  waits[current] = kind;
  leave();
}

inline void fibre_main() {
  for (;;) {
    (*body)();
    done[current] = 1;
    leave();
  }
}

__attribute__((noinline)) inline void enter() {
  if (_setjmp(scheduler)) return;
  Fibre& fibre = fibres[current];
  if (fibre.started) _longjmp(fibre.at, 1);
  fibre.started = true;
  fibre.stack.resize(128 * 1024);
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.data();
  fibre.context.uc_stack.ss_size = fibre.stack.size();
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, fibre_main, 0);
  setcontext(&fibre.context);
}

// A barrier needs every thread of the block, a shuffle every lane of the warp.
inline void check_convergence(unsigned threads) {
  bool barrier = false;
  for (unsigned t = 0; t < threads; ++t) barrier |= !done[t] && waits[t] == kBarrier;
  for (unsigned t = 0; t < threads; ++t) {
    if (barrier && (done[t] || waits[t] != kBarrier)) fail("a barrier that not all threads reach");
    const unsigned first = t / 32 * 32;
    if (done[t] != done[first] || (!done[t] && waits[t] != waits[first])) fail("a shuffle that not all lanes reach");
  }
}

inline void run(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  body = &kernel;
  grid_size = grid;
  if (threads % 32 || threads > kMaxThreads || grid.y > 65535 || grid.z > 65535)
    fail("a launch that CUDA would refuse");
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t block = reversed ? blocks - 1 - i : i;
    block_index = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    std::memset(&__start_emulated_shared, 0xff, &__stop_emulated_shared - &__start_emulated_shared);
    done.assign(threads, 0);
    waits.assign(threads, kRunning);
    for (bool any = true; any;) {
      any = false;
      for (unsigned i = 0; i < threads; ++i) {
        current = reversed ? threads - 1 - i : i;
        if (done[current]) continue;
        thread_index.x = current;
        enter();
        any |= !done[current];
      }
      check_convergence(threads);
    }
  }
}

template <class T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof value <= sizeof exchange[0], "");
  const unsigned me = current;
  std::memcpy(exchange[me], &value, sizeof value);
  wait_for_others(kShuffleOut);
  std::memcpy(&value, exchange[me / 32 * 32 + from % 32], sizeof value);
  wait_for_others(kShuffleIn);
  return value;
}

// ---- Loads: aligned, inside the watched memory, and counted byte by byte

inline const char* watched = nullptr;
inline std::vector<uint8_t> reads;

template <class T>
const T* on_load(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T)) fail("a misaligned load");
  if (watched) {
    const ptrdiff_t begin = reinterpret_cast<const char*>(p) - watched;
    if (begin < 0 || begin + sizeof(T) > reads.size()) fail("a load outside the watched memory");
    for (size_t i = 0; i < sizeof(T); ++i) ++reads[begin + i];
  }
  return p;
}

// ---- Arithmetic: ex2.approx.ftz, with ex2(0) = 1 as PTX promises

inline float exp2_approx(float x) {
  const float y = x == 0.0f ? 1.0f : std::exp2(x) * (1.0f + exp2_error);
  return std::fabs(y) < FLT_MIN ? 0.0f : y;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

using std::isnan;
using std::min;

inline void __syncthreads() {
  emulation::wait_for_others(emulation::kBarrier);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::shuffle(value, emulation::current % 32 ^ mask);
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> shift % 32);
}

// ---- The host's side of the runtime

extern "C" {
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "";
}
}
