// Products of bfloat16 matrices in float32, which torch doesn't have on a CPU: its products give their operands' type.
#pragma once

#include <cstdint>

namespace miwv::cpu {

// out[m][n] = sum_k rows[m][k] * weight[n][k]. Products of bfloat16 are exact in float32; they are added up in float32
// in an order that depends on the width alone.
struct ProductParams {
  const void* rows;  // bfloat16 [num_rows][width]; up to the next multiples of 32 there are numbers, 0 beyond the width
  int64_t num_rows;
  int64_t row_stride;
  const void* weight;  // bfloat16 [entries][width]
  int64_t weight_stride;
  int64_t entries;
  int64_t width;
  void* packed;  // scratch, bfloat16 [entries][width], both rounded up to multiples of 32
  float* out;    // [num_rows][entries], both rounded up: all of it may be written
  int64_t out_stride;
};

bool bf16_supported();  // by compiler and CPU
bool amx_supported();   // by compiler, CPU and system

// Whether the instruction set in use has such a product: avx512_bf16 and amx. Whether the system permits tiles is asked
// with the first product, since the frames of signal handlers grow by 8 KiB with them; if not, vectors are used.
bool has_product();
void product(const ProductParams& params, int num_threads);

}  // namespace miwv::cpu
