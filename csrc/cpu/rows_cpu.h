// CPU launchers for the structs of rows.h. They throw std::invalid_argument for a row, target or offset out of range,
// and may be called from any number of threads at once.
#pragma once

#include "../rows.h"

namespace miwv::cpu {

void token_logprobs(const TokenParams& params, int num_threads);
void response_nll(const ResponseParams& params, int num_threads);
void response_nll_difference(const DifferenceParams& params, int num_threads);
void add_partials(const PartialParams& params, int num_threads);
void combine_partials(const CombineParams& params);

}  // namespace miwv::cpu
