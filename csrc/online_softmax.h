// A softmax denominator as it stands while a row streams by, and the log-probability it ends in; host and device.
//
// Exponentials are taken to base 2 of logits scaled by kLog2E:
//
//   sum_v 2^(kLog2E * x[v]) = sum * 2^reference,     log p(t) = (kLog2E * x[t] - reference - log2(sum)) / kLog2E
//
// kLog2E is a float and is off by 1e-8. Used for the sum and for the target alike, it only scales *differences* of
// logits by that much, so large logits lose nothing. Milakov and Gimelshein, "Online normalizer calculation for
// softmax", arXiv 1805.02867, section 3, is the source of the running reference.
#pragma once

#include <cmath>

#include "host_device.h"

namespace miwv {

constexpr float kLog2E = 1.44269504088896341f;

struct SoftmaxSum {
  double reference;
  double sum;  // NaN for a row that has no softmax: NaN or +inf in it, or nothing but -inf
};

MIWV_HOST_DEVICE inline double log_probability(const SoftmaxSum& row, double target_logit) {
  const double scaled = target_logit * static_cast<double>(kLog2E) - row.reference;
  const double result = (scaled - log2(row.sum)) / static_cast<double>(kLog2E);
  return result > 0 ? 0 : result;  // rounding can lift a certain token above 0; NaN passes
}

}  // namespace miwv
