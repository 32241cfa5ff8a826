#include "product.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "../check.h"
#include "row_kernels.h"
#include "threads.h"

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#define MIWV_BF16
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define MIWV_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace miwv::cpu {

#ifdef MIWV_BF16
namespace {

// A tile is 16 rows of 64 bytes: of 32 bfloat16, of 16 pairs of bfloat16, or of 16 floats.
constexpr int64_t kTileRows = 16, kTileWidth = 32, kTileElements = kTileRows * kTileWidth;

// 16 rows of up to 16 pairs to a tile [pair][row], as the right side of a product has to lie. Rows beyond `count`, and
// elements beyond the mask, are 0.
__attribute__((target("avx512f,avx512bw"))) void pack_tile(const uint16_t* rows, int64_t stride, int64_t count,
                                                           __mmask32 mask, uint16_t* tile) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i)
    a[i] = _mm512_maskz_loadu_epi16(i < count ? mask : 0, i < count ? rows + i * stride : rows);
  // Transposed within 128 bits, then the 128 bits among each other.
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int j = 0; j < 4; ++j) {
    const __m512i even0 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), odd0 = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_si512(tile + 32 * j, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(tile + 32 * (j + 4), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(tile + 32 * (j + 8), _mm512_shuffle_i32x4(even0, even1, 0xdd));
    _mm512_storeu_si512(tile + 32 * (j + 12), _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  }
}

// 32 entries of the head, packed: `columns[0]` and `columns[1]` hold the tiles of 16 each, `tiles` of them.
struct Strip {
  const uint16_t* columns[2];
  int64_t tiles;
  float* out;  // of the first row
};

Strip pack_strip(const ProductParams& p, int64_t number, uint16_t* packed) {
  const int64_t tiles = (p.width + kTileWidth - 1) / kTileWidth, column = tiles * kTileElements;
  for (int64_t half = 0; half < 2; ++half) {
    const int64_t first = number * 2 * kTileRows + half * kTileRows, count = p.entries - first;
    const uint16_t* const rows = static_cast<const uint16_t*>(p.weight) + (count > 0 ? first : 0) * p.weight_stride;
    for (int64_t k = 0; k < tiles; ++k) {
      const int64_t left = p.width - k * kTileWidth;
      const __mmask32 mask = left < kTileWidth ? (1u << left) - 1 : ~0u;
      pack_tile(rows + k * kTileWidth, p.weight_stride, count, mask, packed + half * column + k * kTileElements);
    }
  }
  return {{packed, packed + column}, tiles, p.out + number * 2 * kTileRows};
}

// Eight rows at a time: two registers of sums for each.
__attribute__((target("avx512f,avx512bf16"))) void multiply_vectors(const ProductParams& p, const Strip& strip) {
  constexpr int64_t kRows = 8;
  for (int64_t m = 0; m < p.num_rows; m += kRows) {
    const uint16_t* const rows = static_cast<const uint16_t*>(p.rows) + m * p.row_stride;
    __m512 sums[kRows][2];
    for (int i = 0; i < kRows; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < strip.tiles * kTileRows; ++pair) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(strip.columns[0] + pair * kTileWidth);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(strip.columns[1] + pair * kTileWidth);
      for (int i = 0; i < kRows; ++i) {
        int32_t both;
        std::memcpy(&both, rows + i * p.row_stride + 2 * pair, sizeof both);
        const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], row, first);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], row, second);
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int half = 0; half < 2; ++half)
        _mm512_storeu_ps(strip.out + (m + i) * p.out_stride + half * kTileRows, sums[i][half]);
  }
}

#ifdef MIWV_AMX

constexpr int kGetSupported = 0x1021, kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl(2)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

// 32 rows at a time: four tiles of sums.
__attribute__((target("amx-tile,amx-bf16"))) void multiply_tiles(const ProductParams& p, const Strip& strip) {
  __asm__ volatile("" ::: "memory");  // GCC doesn't know that tiles are loaded from memory
  _tile_loadconfig(&kTileConfig);
  for (int64_t m = 0; m < p.num_rows; m += 2 * kTileRows) {
    const uint16_t* const upper = static_cast<const uint16_t*>(p.rows) + m * p.row_stride;
    const uint16_t* const lower = upper + kTileRows * p.row_stride;
    const int64_t row_bytes = 2 * p.row_stride, out_bytes = 4 * p.out_stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < strip.tiles; ++k) {
      _tile_loadd(4, upper + k * kTileWidth, row_bytes);
      _tile_loadd(6, strip.columns[0] + k * kTileElements, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, strip.columns[1] + k * kTileElements, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, lower + k * kTileWidth, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* const out = strip.out + m * p.out_stride;
    _tile_stored(0, out, out_bytes);
    _tile_stored(1, out + kTileRows, out_bytes);
    _tile_stored(2, out + kTileRows * p.out_stride, out_bytes);
    _tile_stored(3, out + kTileRows * p.out_stride + kTileRows, out_bytes);
  }
  _tile_release();
}

bool permitted() {
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

#endif

}  // namespace

bool bf16_supported() {
  constexpr unsigned kBFloat16 = 1u << 5;  // of EAX
  // Asked once: in a virtual machine the instruction takes microseconds.
  static const bool supported = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax & kBFloat16;
  }();
  return supported;
}

bool has_product() {
  const std::string isa = row_kernels().isa;
  return isa == "avx512_bf16" || isa == "amx";
}

void product(const ProductParams& p, int num_threads) {
  MIWV_ASSERT(bf16_supported());
  auto multiply = multiply_vectors;
#ifdef MIWV_AMX
  if (row_kernels().isa == std::string("amx") && permitted()) multiply = multiply_tiles;
#endif
  const int64_t strips = (p.entries + 2 * kTileRows - 1) / (2 * kTileRows);
  const int64_t strip_elements = (p.width + kTileWidth - 1) / kTileWidth * 2 * kTileElements;
  std::atomic<int64_t> next{0};
  // Each thread packs its strips into the same place, which stays in its cache.
  const int64_t workers = std::min<int64_t>(num_threads, strips);
  parallel_for(workers, 1, num_threads, [&](int64_t worker) {
    uint16_t* const packed = static_cast<uint16_t*>(p.packed) + worker * strip_elements;
    for (int64_t number; (number = next.fetch_add(1, std::memory_order_relaxed)) < strips;)
      multiply(p, pack_strip(p, number, packed));
  });
}

#else

bool bf16_supported() {
  return false;
}

bool has_product() {
  return false;
}

void product(const ProductParams&, int) {
  MIWV_ASSERT(false);
}

#endif

#ifdef MIWV_AMX

bool amx_supported() {
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of EDX
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || ~edx & (kBFloat16 | kTile)) return false;
  uint64_t components = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &components) == 0 && components >> kTileData & 1;
}

#else

bool amx_supported() {
  return false;
}

#endif

}  // namespace miwv::cpu
