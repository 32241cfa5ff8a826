// What a row kernel is told, the same for CPU and CUDA: plain structs of pointers and element strides. Pointers lie on
// the device that the launcher serves; nothing here owns memory.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace miwv {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// What a model does between its head and the softmax: y = scale * x, then softcap * tanh(y / softcap) where there is a
// softcap. Gemma-2 has a softcap, Cohere and Granite a scale.
struct LogitTransform {
  float scale = 1;    // above 0
  float softcap = 0;  // above 0, or 0 for none
};

MIWV_HOST_DEVICE inline double transform_logit(double x, const LogitTransform& transform) {
  const double y = x * transform.scale;
  return transform.softcap > 0 ? transform.softcap * tanh(y / transform.softcap) : y;
}

// A [num_rows, vocab] matrix, or a [num_rows / rows_per_batch, rows_per_batch, vocab] tensor seen as one: row r starts
// at data + (r / rows_per_batch) * batch_stride + (r % rows_per_batch) * row_stride. The entries of a row are
// adjacent; the strides count elements and may be anything, zero and negative included.
struct Logits {
  const void* data;
  DType dtype;
  int64_t num_rows;
  int64_t vocab;
  int64_t row_stride;
  int64_t rows_per_batch;
  int64_t batch_stride;
  LogitTransform transform{};  // of the values as they are read

  MIWV_HOST_DEVICE int64_t row_offset(int64_t row) const {
    return (row / rows_per_batch) * batch_stride + (row % rows_per_batch) * row_stride;
  }
};

// out[t] = log p(targets[t]) by row rows[t], or by row t where rows is null.
struct TokenParams {
  Logits logits;
  const int64_t* rows;     // [num_tokens] or null
  const int64_t* targets;  // [num_tokens]
  int64_t num_tokens;
  float* out;  // [num_tokens]
};

// out[b] = mean over tokens t in [offsets[b], offsets[b + 1]) of -log p(targets[t]); NaN where there is none.
struct ResponseParams {
  Logits logits;
  const int64_t* rows;
  const int64_t* targets;
  int64_t num_tokens;
  const int64_t* offsets;  // [num_responses + 1]
  int64_t num_responses;
  float* out;  // [num_responses]
};

// out[b] = mean over the same tokens of log p by zero_shot - log p by one_shot.
struct DifferenceParams {
  Logits one_shot;
  Logits zero_shot;
  const int64_t* one_shot_rows;
  const int64_t* zero_shot_rows;
  const int64_t* targets;
  int64_t num_tokens;
  const int64_t* offsets;
  int64_t num_responses;
  float* out;
};

// One token over a slice of the vocabulary: the softmax denominator there, and the target's logit, NaN where the slice
// does not hold the target.
struct Partial {
  double max, sum, target;
};

// Adds to partials[t] what row rows[t] holds: entries first to first + vocab of its token's vocabulary.
struct PartialParams {
  Logits logits;
  const int64_t* rows;
  const int64_t* targets;  // in the whole vocabulary
  int64_t num_tokens;
  int64_t first;
  bool begin;         // partials hold nothing yet
  Partial* partials;  // [num_tokens]
};

// out[b] = mean over tokens of -log p by partials, less that by `minus` where there is one. Slice s of token t is
// partials[s * num_tokens + t].
struct CombineParams {
  const Partial* partials;
  const Partial* minus;  // or null
  int64_t num_slices;
  int64_t num_tokens;
  const int64_t* offsets;
  int64_t num_responses;
  float* out;
};

}  // namespace miwv
