// vlmfast._native: kernels by address. Callers pass valid memory and sizes; the checks are in vlmfast/ops.
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "cpu/info_nce.h"
#include "cpu/parallel.h"

namespace py = pybind11;
using namespace vlmfast;
using vlmfast::cpu::Pairs;

namespace {

using Address = uint64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// image, text, dtype, n, m, d, image_row, text_row, scale, bias, labels, text_labels, mask, mask_row, mask_column,
// offset, threads
Pairs pairs(Address image, Address text, int dtype, int64_t n, int64_t m, int64_t d, int64_t image_row,
            int64_t text_row, Address scale, Address bias, Address labels, Address text_labels, Address mask,
            int64_t mask_row, int64_t mask_column, int64_t offset, int threads) {
  return {at<void>(image), at<void>(text), DType(dtype), n, m, d, image_row, text_row, at<void>(scale), at<void>(bias),
          at<int64_t>(labels), at<int64_t>(text_labels), at<uint8_t>(mask), mask_row, mask_column, offset, threads};
}

int info_nce_fwd(const Pairs& p, bool full, Address row_stats, Address column_stats, Address tiles, Address loss,
                 bool rows, bool columns, double smoothing) {
  return cpu::info_nce_fwd({p, full, at<double>(row_stats), at<double>(column_stats), at<void>(tiles), at<void>(loss), rows,
                            columns, smoothing});
}

int info_nce_bwd(const Pairs& p, Address row_stats, Address column_stats, Address tiles, Address row_weight,
                 int64_t row_weight_stride, Address column_weight, int64_t column_weight_stride, double smoothing,
                 Address d_image, Address d_text, int gradient_dtype, Address d_scale) {
  return cpu::info_nce_bwd({p, at<double>(row_stats), at<double>(column_stats), at<void>(tiles), at<void>(row_weight),
                            at<void>(column_weight), row_weight_stride, column_weight_stride, smoothing,
                            at<void>(d_image), at<void>(d_text), DType(gradient_dtype), at<void>(d_scale)});
}

int siglip(const Pairs& p, Address row_weight, int64_t row_weight_stride, Address row_loss,
           Address d_image, Address d_text, int gradient_dtype, Address d_scale, Address d_bias) {
  return cpu::siglip({p, at<void>(row_weight), row_weight_stride, at<void>(row_loss), at<void>(d_image),
                      at<void>(d_text), DType(gradient_dtype), at<void>(d_scale), at<void>(d_bias)});
}

py::dict build_info() {
  py::dict info;
  info["version"] = VLMFAST_VERSION;
  info["compiler"] = VLMFAST_COMPILER;
  info["isa"] = cpu::isa_name();
  info["isas_built"] = cpu::isas_built();
  info["threads_from"] = openmp_in_use() ? "the process's OpenMP runtime" : "plain threads";
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  py::class_<Pairs>(m, "Pairs");
  py::call_guard<py::gil_scoped_release> no_gil;
  m.def("pairs", &pairs);
  m.def("info_nce_fwd", &info_nce_fwd, no_gil);
  m.def("info_nce_bwd", &info_nce_bwd, no_gil);
  m.def("siglip", &siglip, no_gil);
  m.def("use_openmp", &use_openmp);
  m.def("build_info", &build_info);
}
