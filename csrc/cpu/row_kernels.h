// The row kernels of the instruction set in use, decided once: the best that the CPU has, or what MIWV_ISA names.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../rows.h"

namespace miwv::cpu {

// log p(target) by one row of `vocab` adjacent logits.
using RowLogprob = double (*)(const void* row, int64_t vocab, int64_t target);

struct RowKernels {
  const char* isa;
  RowLogprob float32, bfloat16, float16;
  double (*read)(const void* data, int64_t bytes);  // a plain sum, to compare with

  RowLogprob logprob(DType dtype) const {
    return dtype == DType::kFloat32 ? float32 : dtype == DType::kBFloat16 ? bfloat16 : float16;
  }
};

const RowKernels& row_kernels();
std::vector<std::string> available_isas();  // least first
void select_isa(const std::string& name);   // throws std::invalid_argument where the CPU lacks it

}  // namespace miwv::cpu
