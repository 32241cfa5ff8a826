// The only file that knows Python. Pointers and strides arrive as integers that ops has checked against the tensors
// they came from. What can only be seen in the data (targets, rows, offsets) the CPU launchers check and throw for;
// CUDA kernels make it NaN.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/product.h"
#include "cpu/row_kernels.h"
#include "cpu/rows_cpu.h"
#include "rows.h"
#ifdef MIWV_HAVE_CUDA
#include "cuda/rows_cuda.h"
#endif

namespace py = pybind11;

namespace {

using miwv::DType;
using miwv::Logits;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (data, dtype, num_rows, vocab, row_stride, rows_per_batch, batch_stride[, scale, softcap]) as ops packs it.
Logits unpack_logits(const py::tuple& t) {
  Logits logits{pointer<const void>(t[0].cast<uintptr_t>()),
                static_cast<DType>(t[1].cast<int>()),
                t[2].cast<int64_t>(),
                t[3].cast<int64_t>(),
                t[4].cast<int64_t>(),
                t[5].cast<int64_t>(),
                t[6].cast<int64_t>()};
  if (t.size() > 7) logits.transform = {t[7].cast<float>(), t[8].cast<float>()};
  return logits;
}

void cpu_token_logprobs(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens, uintptr_t out,
                        int num_threads) {
  const miwv::TokenParams params{unpack_logits(logits), pointer<const int64_t>(rows), pointer<const int64_t>(targets),
                                 num_tokens, pointer<float>(out)};
  py::gil_scoped_release release;
  miwv::cpu::token_logprobs(params, num_threads);
}

void cpu_response_nll(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens, uintptr_t offsets,
                      int64_t num_responses, uintptr_t out, int num_threads) {
  const miwv::ResponseParams params{unpack_logits(logits),
                                    pointer<const int64_t>(rows),
                                    pointer<const int64_t>(targets),
                                    num_tokens,
                                    pointer<const int64_t>(offsets),
                                    num_responses,
                                    pointer<float>(out)};
  py::gil_scoped_release release;
  miwv::cpu::response_nll(params, num_threads);
}

void cpu_response_nll_difference(const py::tuple& one_shot, const py::tuple& zero_shot, uintptr_t one_shot_rows,
                                 uintptr_t zero_shot_rows, uintptr_t targets, int64_t num_tokens, uintptr_t offsets,
                                 int64_t num_responses, uintptr_t out, int num_threads) {
  const miwv::DifferenceParams params{unpack_logits(one_shot),
                                      unpack_logits(zero_shot),
                                      pointer<const int64_t>(one_shot_rows),
                                      pointer<const int64_t>(zero_shot_rows),
                                      pointer<const int64_t>(targets),
                                      num_tokens,
                                      pointer<const int64_t>(offsets),
                                      num_responses,
                                      pointer<float>(out)};
  py::gil_scoped_release release;
  miwv::cpu::response_nll_difference(params, num_threads);
}

void cpu_add_partials(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens, int64_t first,
                      bool begin, uintptr_t partials, int num_threads) {
  const miwv::PartialParams params{unpack_logits(logits),
                                   pointer<const int64_t>(rows),
                                   pointer<const int64_t>(targets),
                                   num_tokens,
                                   first,
                                   begin,
                                   pointer<miwv::Partial>(partials)};
  py::gil_scoped_release release;
  miwv::cpu::add_partials(params, num_threads);
}

miwv::CombineParams pack_combine(uintptr_t partials, uintptr_t minus, int64_t num_slices, int64_t num_tokens,
                                 uintptr_t offsets, int64_t num_responses, uintptr_t out) {
  return {pointer<const miwv::Partial>(partials),
          pointer<const miwv::Partial>(minus),
          num_slices,
          num_tokens,
          pointer<const int64_t>(offsets),
          num_responses,
          pointer<float>(out)};
}

void cpu_combine_partials(uintptr_t partials, uintptr_t minus, int64_t num_slices, int64_t num_tokens,
                          uintptr_t offsets, int64_t num_responses, uintptr_t out) {
  const auto params = pack_combine(partials, minus, num_slices, num_tokens, offsets, num_responses, out);
  py::gil_scoped_release release;
  miwv::cpu::combine_partials(params);
}

void cpu_product(uintptr_t rows, int64_t num_rows, int64_t row_stride, uintptr_t weight, int64_t weight_stride,
                 int64_t entries, int64_t width, uintptr_t packed, uintptr_t out, int64_t out_stride, int num_threads) {
  const miwv::cpu::ProductParams params{pointer<const void>(rows),
                                        num_rows,
                                        row_stride,
                                        pointer<const void>(weight),
                                        weight_stride,
                                        entries,
                                        width,
                                        pointer<void>(packed),
                                        pointer<float>(out),
                                        out_stride};
  py::gil_scoped_release release;
  miwv::cpu::product(params, num_threads);
}

double cpu_read(uintptr_t data, int64_t bytes) {
  py::gil_scoped_release release;
  return miwv::cpu::row_kernels().read(pointer<const void>(data), bytes);
}

#ifdef MIWV_HAVE_CUDA
// (device, stream, scratch, split) as ops packs it.
miwv::cuda::Launch unpack_launch(const py::tuple& t) {
  return {t[0].cast<int>(), pointer<void>(t[1].cast<uintptr_t>()), pointer<void>(t[2].cast<uintptr_t>()),
          static_cast<miwv::cuda::Split>(t[3].cast<int>())};
}

int64_t cuda_scratch_bytes(const py::tuple& logits, int64_t num_tokens, int sides, bool per_response, int device,
                           int split) {
  return miwv::cuda::scratch_bytes(unpack_logits(logits), num_tokens, sides, per_response, device,
                                   static_cast<miwv::cuda::Split>(split));
}

void cuda_token_logprobs(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens, uintptr_t out,
                         const py::tuple& launch) {
  const miwv::TokenParams params{unpack_logits(logits), pointer<const int64_t>(rows), pointer<const int64_t>(targets),
                                 num_tokens, pointer<float>(out)};
  const miwv::cuda::Launch where = unpack_launch(launch);
  py::gil_scoped_release release;
  miwv::cuda::token_logprobs(params, where);
}

void cuda_response_nll(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens,
                       uintptr_t offsets, int64_t num_responses, uintptr_t out, const py::tuple& launch) {
  const miwv::ResponseParams params{unpack_logits(logits),
                                    pointer<const int64_t>(rows),
                                    pointer<const int64_t>(targets),
                                    num_tokens,
                                    pointer<const int64_t>(offsets),
                                    num_responses,
                                    pointer<float>(out)};
  const miwv::cuda::Launch where = unpack_launch(launch);
  py::gil_scoped_release release;
  miwv::cuda::response_nll(params, where);
}

void cuda_response_nll_difference(const py::tuple& one_shot, const py::tuple& zero_shot, uintptr_t one_shot_rows,
                                  uintptr_t zero_shot_rows, uintptr_t targets, int64_t num_tokens, uintptr_t offsets,
                                  int64_t num_responses, uintptr_t out, const py::tuple& launch) {
  const miwv::DifferenceParams params{unpack_logits(one_shot),
                                      unpack_logits(zero_shot),
                                      pointer<const int64_t>(one_shot_rows),
                                      pointer<const int64_t>(zero_shot_rows),
                                      pointer<const int64_t>(targets),
                                      num_tokens,
                                      pointer<const int64_t>(offsets),
                                      num_responses,
                                      pointer<float>(out)};
  const miwv::cuda::Launch where = unpack_launch(launch);
  py::gil_scoped_release release;
  miwv::cuda::response_nll_difference(params, where);
}

void cuda_add_partials(const py::tuple& logits, uintptr_t rows, uintptr_t targets, int64_t num_tokens, int64_t first,
                       bool begin, uintptr_t partials, const py::tuple& launch) {
  const miwv::PartialParams params{unpack_logits(logits),
                                   pointer<const int64_t>(rows),
                                   pointer<const int64_t>(targets),
                                   num_tokens,
                                   first,
                                   begin,
                                   pointer<miwv::Partial>(partials)};
  const miwv::cuda::Launch where = unpack_launch(launch);
  py::gil_scoped_release release;
  miwv::cuda::add_partials(params, where);
}

void cuda_combine_partials(uintptr_t partials, uintptr_t minus, int64_t num_slices, int64_t num_tokens,
                           uintptr_t offsets, int64_t num_responses, uintptr_t out, const py::tuple& launch) {
  const auto params = pack_combine(partials, minus, num_slices, num_tokens, offsets, num_responses, out);
  const miwv::cuda::Launch where = unpack_launch(launch);
  py::gil_scoped_release release;
  miwv::cuda::combine_partials(params, where);
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.attr("version") = MIWV_VERSION;
#ifdef MIWV_HAVE_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  miwv::cpu::row_kernels();  // a wrong MIWV_ISA shows here, not at the first call
  m.def("isa", [] { return miwv::cpu::row_kernels().isa; });
  m.def("available_isas", &miwv::cpu::available_isas);
  m.def("select_isa", &miwv::cpu::select_isa);  // for tests and benchmarks; users have MIWV_ISA
  m.def("cpu_read", &cpu_read);
  m.def("cpu_has_product", &miwv::cpu::has_product);
  m.def("cpu_product", &cpu_product);
  m.def("cpu_token_logprobs", &cpu_token_logprobs);
  m.def("cpu_response_nll", &cpu_response_nll);
  m.def("cpu_response_nll_difference", &cpu_response_nll_difference);
  m.def("cpu_add_partials", &cpu_add_partials);
  m.def("cpu_combine_partials", &cpu_combine_partials);
#ifdef MIWV_HAVE_CUDA
  m.def("cuda_scratch_bytes", &cuda_scratch_bytes);
  m.def("cuda_token_logprobs", &cuda_token_logprobs);
  m.def("cuda_response_nll", &cuda_response_nll);
  m.def("cuda_response_nll_difference", &cuda_response_nll_difference);
  m.def("cuda_add_partials", &cuda_add_partials);
  m.def("cuda_combine_partials", &cuda_combine_partials);
#endif
}
