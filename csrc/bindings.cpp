// vlmfast._native: kernels by address. Callers pass valid memory and sizes; the checks are in vlmfast/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "cpu/alignment.h"
#include "cpu/attention.h"
#include "cpu/decoding.h"
#include "cpu/diffusion.h"
#include "cpu/dispatch.h"
#include "cpu/group_norm.h"
#include "cpu/info_nce.h"
#include "cpu/parallel.h"
#include "cpu/quantize.h"

namespace py = pybind11;
using namespace vlmfast;
using vlmfast::cpu::Attention;
using vlmfast::cpu::BiAttention;
using vlmfast::cpu::Denoise;
using vlmfast::cpu::DiffusionLoss;
using vlmfast::cpu::Grid;
using vlmfast::cpu::GroupNorm;
using vlmfast::cpu::Pairs;
using vlmfast::cpu::Plane;
using vlmfast::cpu::Quantize;
using vlmfast::cpu::Stream;

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

// sizes are B, N, M and the strides of cost's batch and rows
int ipot(Address cost, int dtype, const std::array<int64_t, 5>& sizes, Address lengths_x, Address lengths_y,
         Address mask_x, Address mask_y, double beta, int64_t iterations, int64_t k, Address plan, int threads) {
  return cpu::ipot({at<void>(cost), DType(dtype), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                    at<int64_t>(lengths_x), at<int64_t>(lengths_y), at<uint8_t>(mask_x), at<uint8_t>(mask_y), beta,
                    iterations, k, at<void>(plan), threads});
}

// Strides of [B, S, H, D], or of packed [N, H, D].
Stream stream(Address address, const py::tuple& strides) {
  size_t last = strides.size() - 1;
  return {at<void>(address), last == 3 ? strides[0].cast<int64_t>() : 0, strides[last - 2].cast<int64_t>(),
          strides[last - 1].cast<int64_t>()};
}

// One direction of attention: sizes and streams here, each option through a method of its own.
Attention attention(int dtype, int64_t sequences, int64_t heads, int64_t sq, int64_t sk, int64_t d, int64_t dv,
                    int64_t batch_q, int64_t batch_k, int64_t length_q, int64_t length_k, Address query,
                    const py::tuple& query_strides, Address key, const py::tuple& key_strides, Address value,
                    const py::tuple& value_strides, double scale, bool causal, uint32_t direction) {
  Attention call;
  call.dtype = DType(dtype), call.sequences = sequences, call.heads = heads;
  call.sq = sq, call.sk = sk, call.d = d, call.dv = dv;
  call.batch_q = batch_q, call.batch_k = batch_k, call.length_q = length_q, call.length_k = length_k;
  call.query = stream(query, query_strides), call.key = stream(key, key_strides);
  call.value = stream(value, value_strides);
  call.scale = scale, call.causal = causal, call.direction = direction;
  return call;
}

void attention_positions(Attention& call, Address lengths_q, Address lengths_k, Address prefix, Address pair_q,
                         Address pair_k, Address cu_q, Address cu_k) {
  call.lengths_q = at<int64_t>(lengths_q), call.lengths_k = at<int64_t>(lengths_k), call.prefix = at<int64_t>(prefix);
  call.pair_q = at<int64_t>(pair_q), call.pair_k = at<int64_t>(pair_k);
  call.cu_q = at<int64_t>(cu_q), call.cu_k = at<int64_t>(cu_k);
}

void attention_rows(Attention& call, Address rows_q, Address rows_k, Address regions, int64_t groups) {
  call.rows_q = at<int64_t>(rows_q), call.rows_k = at<int64_t>(rows_k), call.regions = at<int64_t>(regions);
  call.groups = groups;
}

void attention_key_mask(Attention& call, Address mask, int64_t batch, int64_t column) {
  call.key_mask = at<uint8_t>(mask), call.key_mask_batch = batch, call.key_mask_column = column;
}

void attention_bias(Attention& call, const Plane& bias, int dtype) { call.bias = bias, call.bias_dtype = DType(dtype); }

void attention_dropout(Attention& call, double rate, Address seed, bool probs_dropout) {
  call.dropout = rate, call.seed = *at<uint64_t>(seed), call.probs_dropout = probs_dropout;
}

void attention_outputs(Attention& call, Address out, Address probs, Address lse, Address kept) {
  call.out = at<void>(out), call.probs = at<void>(probs), call.lse = at<void>(lse), call.kept = at<void>(kept);
}

void attention_gradients(Attention& call, Address d_out, const py::tuple& d_out_strides, Address d_probs, Address d_lse,
                         Address kept, Address d_query, Address d_key, Address d_value, Address d_bias, int dtype,
                         const std::array<int64_t, 4>& bias_shape) {
  call.d_out = stream(d_out, d_out_strides), call.d_probs = at<void>(d_probs), call.d_lse = at<void>(d_lse),
  call.kept = at<void>(kept);
  call.d_query = at<void>(d_query), call.d_key = at<void>(d_key), call.d_value = at<void>(d_value);
  call.d_bias = at<void>(d_bias), call.gradient_dtype = DType(dtype);
  std::copy(bias_shape.begin(), bias_shape.end(), call.bias_shape);
}

BiAttention bi_attention(int dtype, const std::array<int64_t, 7>& sizes, Address query_b,
                         const py::tuple& query_strides, Address key_a, const py::tuple& key_strides, Address value_a,
                         const py::tuple& value_a_strides, Address value_b, const py::tuple& value_b_strides,
                         Address mask_a, Address mask_b, double scale, double dropout_a, double dropout_b,
                         Address seed) {
  BiAttention call;
  call.dtype = DType(dtype);
  call.batch = sizes[0], call.heads = sizes[1], call.sa = sizes[2], call.sb = sizes[3];
  call.d = sizes[4], call.dv_a = sizes[5], call.dv_b = sizes[6];
  call.query_b = stream(query_b, query_strides), call.key_a = stream(key_a, key_strides);
  call.value_a = stream(value_a, value_a_strides), call.value_b = stream(value_b, value_b_strides);
  call.mask_a = at<uint8_t>(mask_a), call.mask_b = at<uint8_t>(mask_b);
  call.scale = scale, call.dropout_a = dropout_a, call.dropout_b = dropout_b,
  call.seed = seed ? *at<uint64_t>(seed) : 0;
  return call;
}

void bi_attention_outputs(BiAttention& call, Address out_a, Address out_b, Address lse_a, Address lse_b,
                          Address stats_a, Address stats_b) {
  call.out_a = at<void>(out_a), call.out_b = at<void>(out_b), call.lse_a = at<void>(lse_a),
  call.lse_b = at<void>(lse_b);
  call.stats_a = at<void>(stats_a), call.stats_b = at<void>(stats_b);
}

void bi_attention_gradients(BiAttention& call, Address d_out_a, const py::tuple& d_out_a_strides, Address d_out_b,
                            const py::tuple& d_out_b_strides, Address d_lse_a, Address d_lse_b, Address d_query_b,
                            Address d_key_a, Address d_value_a, Address d_value_b) {
  call.d_out_a = stream(d_out_a, d_out_a_strides), call.d_out_b = stream(d_out_b, d_out_b_strides);
  call.d_lse_a = at<void>(d_lse_a), call.d_lse_b = at<void>(d_lse_b);
  call.d_query_b = at<void>(d_query_b), call.d_key_a = at<void>(d_key_a);
  call.d_value_a = at<void>(d_value_a), call.d_value_b = at<void>(d_value_b);
}

template <int kernel(const Attention* const*, int, int)>
int attention_run(const Attention& first, const Attention* second, int threads) {
  const Attention* calls[] = {&first, second};
  return kernel(calls, second ? 2 : 1, threads);
}

// batch, positions, vocabulary, width
using QuantizeSizes = std::array<int64_t, 4>;

Quantize quantize(const QuantizeSizes& sizes, const Grid& logits, const Grid& given, bool draws, uint64_t seed,
                  uint64_t offset, Address codebook, double tau, int threads, Address z, Address indices, Address lse,
                  Address plain, Address expected) {
  auto [batch, positions, vocabulary, width] = sizes;
  return {batch, positions, vocabulary, width, logits, given, draws, seed, offset, at<void>(codebook), tau, threads,
          at<void>(z), at<int64_t>(indices), at<void>(lse), at<void>(plain), at<void>(expected)};
}

void quantize_bwd(const Quantize& call, Address d_z, Address mean_code, Address plain_code, double gain,
                  double kl, double plain_gain, const Grid& d_logits, Address d_codebook) {
  cpu::quantize_bwd({call, at<void>(d_z), at<void>(mean_code), at<void>(plain_code), gain, kl, plain_gain,
                     d_logits, at<void>(d_codebook)});
}

void few_row_linear(Address x, Address weight, Address bias, Address out, int64_t rows, int64_t outputs, int64_t inputs,
                    int64_t weight_row, bool wide, int threads) {
  cpu::few_row_linear({at<void>(x), at<void>(weight), at<void>(bias), at<void>(out), rows, outputs, inputs, weight_row,
                       wide, threads});
}

void encode_indices(const QuantizeSizes& sizes, const Grid& features, Address weight, Address bias, bool wide,
                    Address indices, int threads) {
  auto [batch, positions, vocabulary, width] = sizes;
  cpu::encode_indices({batch, positions, vocabulary, width, features, at<void>(weight), at<void>(bias), wide,
                       at<int64_t>(indices), threads});
}

void gumbel_noise(int64_t rows, int64_t vocabulary, uint64_t seed, uint64_t offset, bool wide, Address to, int threads) {
  cpu::gumbel_noise(rows, vocabulary, seed, offset, wide, at<void>(to), threads);
}

// batch, channels, inner
using SampleSizes = std::array<int64_t, 3>;

void denoise_step(const SampleSizes& sizes, Address x, int x_dtype, Address out, int out_dtype,
                  const std::array<int64_t, 2>& out_strides, bool guided, bool learned, double guidance_scale,
                  double clamp, const std::array<Address, 4>& extra, Address mask,
                  const std::array<int64_t, 2>& mask_strides, const std::array<Address, 3>& history,
                  const std::array<double, 4>& weights, Address t, int64_t step, Address table, bool draws,
                  uint64_t seed, uint64_t offset, const std::array<Address, 3>& found, int threads) {
  Denoise call;
  std::tie(call.batch, call.channels, call.inner) = std::tie(sizes[0], sizes[1], sizes[2]);
  call.x = {at<void>(x), DType(x_dtype), call.channels * call.inner};
  call.out = {at<void>(out), DType(out_dtype), out_strides[0]};
  call.guided = guided, call.learned = learned, call.guidance_scale = guidance_scale, call.clamp = clamp;
  call.threshold = at<void>(extra[0]), call.image = at<void>(extra[1]), call.shift = at<void>(extra[2]);
  call.noise = at<void>(extra[3]), call.mask = at<void>(mask);
  call.mask_batch = mask_strides[0], call.mask_channel = mask_strides[1];
  for (size_t k = 0; k < 3; ++k) call.history[k] = at<void>(history[k]), call.found[k] = at<void>(found[k]);
  std::copy(weights.begin(), weights.end(), call.weights);
  call.t = at<int64_t>(t), call.step = step, call.table = at<double>(table);
  call.draws = draws, call.seed = seed, call.offset = offset, call.threads = threads;
  cpu::denoise_step(call);
}

template <void kernel(const DiffusionLoss&)>
void diffusion_loss(const SampleSizes& sizes, Address out, int out_dtype, Address noise, int noise_dtype, Address x0,
                    int x0_dtype, const std::array<int64_t, 2>& out_strides, Address t, int64_t step, Address table,
                    bool learned, const std::vector<Address>& found, int threads) {
  int64_t size = sizes[1] * sizes[2];
  kernel({sizes[0], sizes[1], sizes[2], {at<void>(out), DType(out_dtype), out_strides[0]},
          {at<void>(noise), DType(noise_dtype), size}, {at<void>(x0), DType(x0_dtype), size}, at<int64_t>(t), step,
          at<double>(table), learned, at<void>(found.at(0)), at<void>(found.at(1)),
          found.size() > 2 ? at<void>(found[2]) : nullptr, threads});
}

// sizes are B, C, S, G; then x and its strides of batch and channel, weight, bias, scale and shift with their strides of
// batch, and the [B, G] statistics
GroupNorm group_norm(int dtype, const std::array<int64_t, 4>& sizes, Address x, int64_t x_batch, int64_t x_channel,
                     Address weight, Address bias, Address scale, int64_t scale_batch, Address shift,
                     int64_t shift_batch, Address mean, Address rstd, double eps, bool silu, int threads) {
  auto [batch, channels, spatial, groups] = sizes;
  return {DType(dtype), batch, channels, spatial, groups, {at<void>(x), x_batch, x_channel}, at<void>(weight),
          at<void>(bias), at<void>(scale), at<void>(shift), scale_batch, shift_batch, eps, silu, threads,
          at<double>(mean), at<double>(rstd), {}};
}

// [B, C, S] without gaps
cpu::Activations packed(const GroupNorm& call, Address address) {
  return {at<void>(address), call.channels * call.spatial, call.spatial};
}

void group_norm_fwd(GroupNorm& call, Address out) {
  call.out = packed(call, out);
  cpu::group_norm_fwd(call);
}

void group_norm_bwd(GroupNorm& call, Address d_out, int64_t d_out_batch, int64_t d_out_channel, Address d_x,
                    Address d_weight, Address d_bias, Address d_scale, Address d_shift) {
  call.out = {at<void>(d_out), d_out_batch, d_out_channel};
  cpu::group_norm_bwd({call, packed(call, d_x), at<void>(d_weight), at<void>(d_bias), at<void>(d_scale),
                       at<void>(d_shift)});
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
  m.def("ipot", &ipot, no_gil);

  py::class_<Plane>(m, "Plane").def(
      py::init([](Address address, int64_t batch, int64_t head, int64_t row, int64_t column) {
        return Plane{at<void>(address), batch, head, row, column};
      }));
  py::class_<Attention>(m, "Attention")
      .def(py::init(&attention))
      .def("positions", &attention_positions)
      .def("rows", &attention_rows)
      .def("key_mask", &attention_key_mask)
      .def("mask", [](Attention& call, const Plane& mask) { call.mask = mask; })
      .def("bias", &attention_bias)
      .def("dropout", &attention_dropout)
      .def("outputs", &attention_outputs)
      .def("gradients", &attention_gradients);
  py::class_<BiAttention>(m, "BiAttention")
      .def(py::init(&bi_attention))
      .def("outputs", &bi_attention_outputs)
      .def("gradients", &bi_attention_gradients);
  m.def("bi_attention_fwd", &cpu::bi_attention_fwd, no_gil);
  m.def("bi_attention_bwd", &cpu::bi_attention_bwd, no_gil);
  m.def("attention_fwd", &attention_run<cpu::attention_fwd>, no_gil);
  m.def("attention_bwd", &attention_run<cpu::attention_bwd>, no_gil);

  py::class_<Grid>(m, "Grid").def(py::init([](Address address, int dtype, int64_t batch, int64_t position, int64_t entry) {
    return Grid{at<void>(address), DType(dtype), batch, position, entry};
  }));
  py::class_<Quantize>(m, "Quantize").def(py::init(&quantize));
  m.def("quantize_fwd", &cpu::quantize_fwd, no_gil);
  m.def("quantize_bwd", &quantize_bwd, no_gil);
  m.def("encode_indices", &encode_indices, no_gil);
  m.def("few_row_linear", &few_row_linear, no_gil);
  m.def("denoise_step", &denoise_step, no_gil);
  m.def("diffusion_loss", &diffusion_loss<cpu::diffusion_loss>, no_gil);
  m.def("diffusion_loss_bwd", &diffusion_loss<cpu::diffusion_loss_bwd>, no_gil);
  m.def("gumbel_noise", &gumbel_noise, no_gil);

  py::class_<GroupNorm>(m, "GroupNorm").def(py::init(&group_norm));
  m.def("group_norm_fwd", &group_norm_fwd, no_gil);
  m.def("group_norm_bwd", &group_norm_bwd, no_gil);

  m.def("use_openmp", &use_openmp);
  m.def("build_info", &build_info);
}
