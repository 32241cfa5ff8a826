// The product of bfloat16 matrices by AMX on CPUs without it: the instructions on tiles are functions on arrays here.
// What packs the tiles is AVX-512 and runs as it is.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace {

float tiles[8][16][16];

float widen(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void multiply(int sums, int left, int right) {
  for (int m = 0; m < 16; ++m)
    for (int pair = 0; pair < 16; ++pair)
      for (int n = 0; n < 16; ++n) {
        uint16_t a[2], b[2];
        std::memcpy(a, &tiles[left][m][pair], sizeof a);
        std::memcpy(b, &tiles[right][pair][n], sizeof b);
        tiles[sums][m][n] += widen(a[0]) * widen(b[0]);
        tiles[sums][m][n] += widen(a[1]) * widen(b[1]);
      }
}

void load(int tile, const void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles[tile][row], static_cast<const char*>(base) + row * stride, 64);
}

void store(int tile, void* base, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, tiles[tile][row], 64);
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(tiles[tile], 0, sizeof tiles[tile])
#define _tile_loadd(tile, base, stride) load(tile, base, stride)
#define _tile_stored(tile, base, stride) store(tile, base, stride)
#define _tile_dpbf16ps(sums, left, right) multiply(sums, left, right)
#define syscall(...) 0  // the system permits tiles

#include "../../csrc/cpu/product.cpp"

#ifndef MIWV_AMX
#error "this compiler does not know AMX"
#endif

namespace miwv::cpu {

const RowKernels& row_kernels() {
  static const RowKernels kernels{"amx", nullptr, nullptr, nullptr, nullptr};
  return kernels;
}

void parallel_for(int64_t count, int64_t, int, Body body, const void* context) {
  body(context, 0, count);
}

}  // namespace miwv::cpu

namespace {

constexpr uint16_t kNaN = 0x7fc0;  // wherever nothing should be read, or what is read should not count
constexpr float kUntouched = 7;

int64_t up(int64_t size) {
  return (size + 31) / 32 * 32;
}

bool check(int64_t rows, int64_t entries, int64_t width, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  const auto draw = [&] {
    const float value = normal(generator);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t(bits >> 16);
  };
  const int64_t row_stride = up(width) + 7, weight_stride = width + 5, out_stride = up(entries);
  std::vector<uint16_t> left(up(rows) * row_stride, 0), weight(entries * weight_stride, kNaN);
  std::vector<uint16_t> packed(up(entries) * up(width), kNaN);
  std::vector<float> out(up(rows) * out_stride + 16, kUntouched);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < width; ++k) left[i * row_stride + k] = draw();
  for (int64_t i = 0; i < entries; ++i)
    for (int64_t k = 0; k < width; ++k) weight[i * weight_stride + k] = draw();
  miwv::cpu::product({left.data(), rows, row_stride, weight.data(), weight_stride, entries, width, packed.data(),
                      out.data(), out_stride},
                     3);
  for (int64_t i = up(rows) * out_stride; i < int64_t(out.size()); ++i)
    if (out[i] != kUntouched) return false;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t n = 0; n < entries; ++n) {
      double exact = 0, most = 0;
      for (int64_t k = 0; k < width; ++k) {
        const double term = double(widen(left[i * row_stride + k])) * widen(weight[n * weight_stride + k]);
        exact += term;
        most += std::abs(term);
      }
      // Float32 sums in any order: a rounding for each term.
      if (!(std::abs(out[i * out_stride + n] - exact) <= double(width) * 0x1p-24 * most)) return false;
    }
  return true;
}

}  // namespace

int main() {
  std::mt19937 generator(1);
  for (const int64_t rows : {1, 16, 31, 32, 33, 70})
    for (const int64_t entries : {1, 15, 16, 17, 33, 100})
      for (const int64_t width : {1, 2, 31, 32, 33, 577})
        if (!check(rows, entries, width, generator)) {
          std::printf("wrong with %ld rows, %ld entries, width %ld\n", long(rows), long(entries), long(width));
          return 1;
        }
}
