// A softmax denominator over some of the entries of a row, how two are put together, and the log-probability it ends
// in; host and device.
//
//   log sum_v exp(x[v]) = max + log(sum),     log p(t) = x[t] - max - log(sum)
//
// Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, section 3, is the source of
// the running maximum.
#pragma once

#include <cmath>

#include "host_device.h"

namespace miwv {

// Kernels take exponentials to base 2. As a float it is off by 1e-8, which scales differences of logits by that much.
constexpr float kLog2E = 1.44269504088896341f;

struct SoftmaxSum {
  double max;  // a number near the largest logit; means nothing where the sum is 0
  double sum;  // 0 where all is -inf, NaN where there is NaN or +inf
};

MIWV_HOST_DEVICE inline SoftmaxSum combine(const SoftmaxSum& a, const SoftmaxSum& b) {
  if (a.sum == 0) return b;
  if (b.sum == 0) return a;
  const double max = a.max > b.max ? a.max : b.max;
  return {max, a.sum * exp(a.max - max) + b.sum * exp(b.max - max)};
}

MIWV_HOST_DEVICE inline double log_probability(const SoftmaxSum& row, double target_logit) {
  const double result = (target_logit - row.max) - log(row.sum);
  return row.sum == 0 ? NAN : result > 0 ? 0 : result;  // rounding can lift a certain token above 0; NaN passes
}

}  // namespace miwv
