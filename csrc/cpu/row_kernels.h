// The row kernels of the instruction set in use, decided once: the best that the CPU has, or what MIWV_ISA names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../online_softmax.h"
#include "../rows.h"

namespace miwv::cpu {

// The softmax denominator of `vocab` adjacent logits.
using RowSum = SoftmaxSum (*)(const void* row, int64_t vocab, const LogitTransform& transform);

struct RowKernels {
  const char* isa;
  RowSum float32, bfloat16, float16;
  double (*read)(const void* data, int64_t bytes);  // a plain sum, to compare with

  RowSum row_sum(DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kBFloat16 ? bfloat16 : float16;
  }
};

const RowKernels& row_kernels();
std::vector<std::string> available_isas();  // least first
void select_isa(const std::string& name);   // throws std::invalid_argument where the CPU lacks it

}  // namespace miwv::cpu
