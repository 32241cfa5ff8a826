// CUDA launchers for the structs of rows.h, whose pointers are device pointers here. They put kernels on the caller's
// stream and return: nothing waits, nothing is allocated, and so they can be captured in a CUDA graph.
//
// What is only in the data cannot throw: a row or target out of range gives NaN for its token, and so for its response;
// offsets out of range or falling give NaN for theirs. Nothing is read or written out of bounds.
#pragma once

#include "../rows.h"

namespace miwv::cuda {

enum class Split : int { kNever = 0, kAlways = 1, kFewRows = -1 };  // the result is the same, to the bit

struct Launch {
  int device;
  void* stream;   // a cudaStream_t
  void* scratch;  // scratch_bytes() on the device, aligned to 8 bytes
  Split split;
};

// What the launchers below need for num_tokens tokens; sides is 2 for a difference, 1 otherwise.
int64_t scratch_bytes(const Logits& logits, int64_t num_tokens, int sides, bool per_response, int device, Split split);

// These throw std::invalid_argument for sizes that don't fit a launch, and std::runtime_error for what CUDA reports.
void token_logprobs(const TokenParams& params, const Launch& launch);
void response_nll(const ResponseParams& params, const Launch& launch);
void response_nll_difference(const DifferenceParams& params, const Launch& launch);
void add_partials(const PartialParams& params, const Launch& launch);
void combine_partials(const CombineParams& params, const Launch& launch);  // scratch: a double per token and side

}  // namespace miwv::cuda
