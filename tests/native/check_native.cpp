// Drives the native core without Python, for the sanitizers: every option on small odd shapes, outputs in buffers of
// exactly their size, compared with the plain formulae in double. Prints "N passed, N failed".
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/info_nce.h"

using namespace vlmfast;
using namespace vlmfast::cpu;

namespace {

int passed = 0, failed = 0;
std::mt19937 generator(0);

template <class T>
constexpr DType type_of = sizeof(T) == 4 ? DType::float32 : DType::float64;

double uniform() { return std::uniform_real_distribution<double>(-1, 1)(generator); }
double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

void expect_close(const char* what, double ours, double truth, double tolerance) {
  bool close = std::abs(ours - truth) <= tolerance || (std::isinf(truth) && ours == truth);
  if (close) {
    ++passed;
  } else {
    ++failed;
    std::printf("%s: %.17g, must be %.17g within %.3g\n", what, ours, truth, tolerance);
  }
}

// 16-bit inputs are kept as their exact values in double beside the stored bits.
struct Features {
  DType dtype;
  int64_t rows, width, stride;
  std::vector<char> bytes;
  std::vector<double> values;

  Features(DType d, int64_t r, int64_t w, int64_t gap) : dtype(d), rows(r), width(w), stride(w + gap) {
    int64_t size = d == DType::float64 ? 8 : d == DType::float32 ? 4 : 2;
    bytes.resize(size_t(rows ? ((rows - 1) * stride + width) * size : 0));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < width; ++k) {
        double value = uniform();
        char* at = bytes.data() + (i * stride + k) * size;
        if (d == DType::float64) {
          memcpy(at, &value, 8);
        } else if (d == DType::float32) {
          float single = float(value);
          memcpy(at, &single, 4), value = double(single);
        } else {
          uint16_t half = d == DType::bfloat16 ? float_to_bfloat16(float(value)) : float_to_float16(float(value));
          memcpy(at, &half, 2);
          value = double(d == DType::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half));
        }
        values.push_back(value);
      }
  }
  double at(int64_t i, int64_t k) const { return values[size_t(i * width + k)]; }
};

struct Case {
  DType dtype;
  int64_t n, m, d, offset;
  double scale, bias;
  bool labelled, masked, full;
  double smoothing;
  int threads;
};

template <class T>
void check(const Case& c) {
  Features image(c.dtype, c.n, c.d, 3), text(c.dtype, c.m, c.d, 0);
  T scale = T(c.scale), bias = T(c.bias);
  std::vector<int64_t> labels, text_labels;
  std::vector<uint8_t> mask;
  for (int64_t i = 0; c.labelled && i < c.n; ++i) labels.push_back(i % 3);
  for (int64_t j = 0; c.labelled && j < c.m; ++j) text_labels.push_back(j % 4);
  for (int64_t at = 0; c.masked && at < c.n * c.m; ++at) mask.push_back(uniform() < -0.4);
  Pairs pairs{image.bytes.data(), text.bytes.data(), c.dtype, c.n, c.m, c.d, image.stride, text.stride, &scale, &bias,
              c.labelled ? labels.data() : nullptr, c.labelled ? text_labels.data() : nullptr,
              c.masked ? mask.data() : nullptr, c.m, 1, c.offset, c.threads};
  int stats_count = c.full ? 6 : 2;
  std::vector<double> rows(size_t(stats_count * c.n)), columns(size_t(stats_count * c.m));
  std::vector<T> tiles(size_t((c.n + 196) * (c.m + 64)));
  std::vector<double> logits(size_t(c.n * c.m));
  double largest = 0;
  auto positive = [&](int64_t i, int64_t j) {
    return c.labelled ? labels[size_t(i)] == text_labels[size_t(j)] : i + c.offset == j;
  };
  auto allowed = [&](int64_t i, int64_t j) {
    return !c.masked || !mask[size_t(i * c.m + j)] || (!c.labelled && positive(i, j));
  };
  for (int64_t i = 0; i < c.n; ++i)
    for (int64_t j = 0; j < c.m; ++j) {
      double dot = 0;
      for (int64_t k = 0; k < c.d; ++k) dot += image.at(i, k) * text.at(j, k);
      logits[size_t(i * c.m + j)] = c.scale * dot + c.bias;
      largest = std::max(largest, std::abs(logits[size_t(i * c.m + j)]));
    }
  // a logit's rounding error, and that of the sum over a line
  double unit = (c.dtype == DType::float64 ? 0x1p-52 : 0x1p-23) * (1 + largest) * double(c.d + 4);
  double tolerance = unit * std::sqrt(double(c.n + c.m)), gradient_tolerance = 4 * (1 + c.scale) * tolerance;

  T loss;
  InfoNceForward forward{pairs, c.full, rows.data(), columns.data(), tiles.data(), &loss, true, true, c.smoothing};
  expect_close("status", info_nce_fwd(forward), 0, 0);
  std::vector<double> gradient(size_t(c.n * c.m), 0.0);
  auto line = [&](bool by_row, int64_t index) {
    int64_t count = by_row ? c.m : c.n, lines = by_row ? c.n : c.m;
    auto pair = [&](int64_t other, int64_t& i, int64_t& j) { i = by_row ? index : other, j = by_row ? other : index; };
    double sum = 0, target = 0, positives = 0, pairs_counted = 0, own = 0;
    int64_t i, j;
    for (int64_t other = 0; other < count; ++other) {
      pair(other, i, j);
      if (!allowed(i, j)) continue;
      double value = logits[size_t(i * c.m + j)];
      pairs_counted += 1;
      own += std::exp(value);
      if (c.labelled || !positive(i, j)) sum += std::exp(value);
      if (positive(i, j)) target += value, positives += 1;
    }
    const double* stats = by_row ? rows.data() : columns.data();
    expect_close("lse", stats[LSE * lines + index], std::log(sum), tolerance);
    expect_close("positive", stats[POSITIVE * lines + index], target, tolerance);
    if (c.full) expect_close("count", stats[COUNT * lines + index], pairs_counted, 0);
    if (positives == 0) return;
    for (int64_t other = 0; other < count; ++other) {
      pair(other, i, j);
      if (!allowed(i, j)) continue;
      double value = std::exp(logits[size_t(i * c.m + j)]) / own - c.smoothing / pairs_counted;
      if (positive(i, j)) value -= (1 - c.smoothing) / positives;
      gradient[size_t(i * c.m + j)] += value;
    }
  };
  for (int64_t i = 0; i < c.n; ++i) line(true, i);
  for (int64_t j = 0; j < c.m; ++j) line(false, j);

  // the gradient of the logits is rounded to bfloat16 where the processor multiplies bfloat16
  double rounding = isa() == Isa::avx512bf16 && c.dtype == DType::bfloat16 ? 0x1p-8 * c.scale : 0;
  auto add = [](double term, double& sum, double& size) { sum += term, size += std::abs(term); };
  // the diagonal may lie outside this strip: such a line has no positive here, and the caller merges statistics
  bool complete = c.labelled || (c.n == c.m && c.offset == 0);
  for (const void* kept : {static_cast<const void*>(tiles.data()), static_cast<const void*>(nullptr)}) {
    if (!complete) break;
    std::vector<T> d_image(size_t(c.n * c.d)), d_text(size_t(c.m * c.d));
    T weight = 1, d_scale;
    InfoNceBackward backward{pairs, rows.data(), columns.data(), kept, &weight, &weight, 0, 0, c.smoothing,
                             d_image.data(), d_text.data(), type_of<T>, &d_scale};
    expect_close("status", info_nce_bwd(backward), 0, 0);
    double scale_gradient = 0;
    for (int64_t k = 0; k < c.d; ++k) {
      for (int64_t i = 0; i < c.n; ++i) {
        double truth = 0, size = 0;
        for (int64_t j = 0; j < c.m; ++j) add(gradient[size_t(i * c.m + j)] * text.at(j, k), truth, size);
        scale_gradient += truth * image.at(i, k);
        expect_close("d_image", double(d_image[size_t(i * c.d + k)]), c.scale * truth,
                     gradient_tolerance + rounding * size);
      }
      for (int64_t j = 0; j < c.m; ++j) {
        double truth = 0, size = 0;
        for (int64_t i = 0; i < c.n; ++i) add(gradient[size_t(i * c.m + j)] * image.at(i, k), truth, size);
        expect_close("d_text", double(d_text[size_t(j * c.d + k)]), c.scale * truth,
                     gradient_tolerance + rounding * size);
      }
    }
    expect_close("d_scale", double(d_scale), scale_gradient, double(c.n + c.d) * gradient_tolerance);
  }

  if (c.labelled || c.masked) return;
  std::vector<T> row_loss(size_t(c.n), T(0)), d_image(size_t(c.n * c.d)), d_text(size_t(c.m * c.d));
  T weight = 1, d_scale, d_bias;
  SigLip call{pairs, &weight, 0, row_loss.data(), d_image.data(), d_text.data(), type_of<T>, &d_scale, &d_bias};
  expect_close("status", siglip(call), 0, 0);
  double bias_gradient = 0;
  for (int64_t i = 0; i < c.n; ++i) {
    double truth = 0;
    for (int64_t j = 0; j < c.m; ++j) {
      double sign = positive(i, j) ? 1 : -1, z = sign * logits[size_t(i * c.m + j)];
      truth += softplus(-z);
      bias_gradient -= sign / (1 + std::exp(z));
    }
    expect_close("siglip row", double(row_loss[size_t(i)]), truth, double(c.m) * tolerance);
  }
  expect_close("siglip d_bias", double(d_bias), bias_gradient, 8 * double(c.n * c.m) * unit);
}

}  // namespace

#include "check_alignment.h"
#include "check_attention.h"
#include "check_diffusion.h"
#include "check_group_norm.h"
#include "check_quantize.h"

int main() {
  struct Shape {
    int64_t n, m, d, offset;
  };
  for (Shape s : {Shape{1, 1, 1, 0}, {2, 2, 3, 0}, {15, 15, 16, 0}, {17, 17, 0, 0}, {33, 33, 7, 0}, {65, 65, 40, 0},
                  {190, 190, 5, 0}, {7, 530, 4, 100}, {200, 9, 6, -150}, {0, 5, 4, 0}, {3, 8, 2, 6}})
    for (int threads : {1, 3})
      for (double scale : {1.5, 60.0})
        for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
          for (int option = 0; option < 6; ++option) {
            Case c{dtype, s.n, s.m, s.d, s.offset, scale, 0.25, option == 3 || option == 4, option == 2 || option == 4,
                   option > 0, option == 5 || option == 4 ? 0.1 : 0, threads};
            if (c.masked && !c.labelled) c.full = false;
            if (dtype == DType::float64)
              check<double>(c);
            else
              check<float>(c);
          }
  float nan = std::numeric_limits<float>::quiet_NaN(), feature = 1;
  double stats[2], other[2];
  Pairs pairs{&feature, &feature, DType::float32, 1, 1, 1, 1, 1, &nan, nullptr, nullptr, nullptr, nullptr, 0, 0, 0, 1};
  expect_close("NaN scale", info_nce_fwd({pairs, false, stats, other, nullptr, nullptr, true, true, 0}), 1, 0);
  check_attention_family();
  check_alignment_family();
  check_quantize_family();
  check_diffusion_family();
  check_group_norm_family();
  std::printf("instruction set %s\n%d passed, %d failed\n", isa_name(), passed, failed);
  return failed != 0;
}
