// The diffusion kernels' part of check_native.cpp: every element type and every set of inputs on small odd shapes,
// outputs in buffers of exactly their size, against the plain formulae in double.
#pragma once
#include "../../csrc/common/philox.h"
#include "../../csrc/cpu/diffusion.h"

namespace {

double normal_at(uint64_t seed, uint32_t row, uint32_t offset, int64_t element) {
  uint32_t words[4] = {uint32_t(element / 64 * 16 + element % 16), row, offset, 0x64696666u};
  philox(seed, words);
  int word = int(element / 16 % 4);
  double u = (double(words[word & 2]) + 0.5) * 0x1p-32, angle = (double(words[(word & 2) + 1]) + 0.5) * 0x1p-32;
  double radius = std::sqrt(-2 * std::log1p(-u));
  return radius * (word & 1 ? std::sin(2 * M_PI * angle) : std::cos(2 * M_PI * angle));
}

struct DiffusionCase {
  DType dtype, out_dtype;
  int64_t batch, channels, inner;
  int options;  // bits: 1 guided, 2 learned, 4 mask, 8 mask of each channel, 16 shift, 32 threshold, 64 history, 128 given
  int threads;
};

// Largest difference that rounding a result to its type explains.
double rounding_of(DType dtype, double value) {
  double unit = dtype == DType::bfloat16 ? 0x1p-8 : dtype == DType::float16 ? 0x1p-10 : 0;
  return unit * std::abs(value) + unit / 64;
}

template <class T>
void check_denoise(const DiffusionCase& q) {
  bool guided = q.options & 1, learned = q.options & 2, masked = q.options & 4, each = q.options & 8;
  bool shifted = q.options & 16, threshold = q.options & 32, combined = q.options & 64, given = q.options & 128;
  int64_t B = q.batch, size = q.channels * q.inner;
  Features x(q.dtype, B, size, 3), out(q.out_dtype, guided ? 2 * B : B, learned ? 2 * size : size, 5);
  Features image(type_of<T>, B, size, 0), shift(type_of<T>, B, size, 0), noise(type_of<T>, B, size, 0);
  Features mask(type_of<T>, B, each ? size : q.inner, 0);
  std::vector<T> bounds;
  for (int64_t b = 0; b < B; ++b) bounds.push_back(T(1.1 + uniform()));
  std::vector<Features> history(3, Features(type_of<T>, B, size, 0));
  std::vector<double> table(36);
  for (double& value : table) value = uniform();
  table[7] = 0;  // no noise at step 0
  std::vector<int64_t> t;
  for (int64_t b = 0; b < B; ++b) t.push_back(b % 3);
  int64_t bytes = q.dtype == DType::float64 ? 8 : q.dtype == DType::float32 ? 4 : 2;
  std::vector<std::vector<char>> found(3, std::vector<char>(size_t(B * size * bytes)));

  Denoise call;
  call.batch = B, call.channels = q.channels, call.inner = q.inner, call.threads = q.threads;
  call.x = {x.bytes.data(), q.dtype, x.stride}, call.out = {out.bytes.data(), q.out_dtype, out.stride};
  call.guided = guided, call.learned = learned, call.guidance_scale = 2.5, call.clamp = 0.7;
  if (threshold) call.threshold = bounds.data();
  if (shifted) call.shift = shift.bytes.data();
  if (masked) {
    call.mask = mask.bytes.data(), call.image = image.bytes.data();
    call.mask_batch = mask.stride, call.mask_channel = each ? q.inner : 0;
  }
  if (combined)
    for (int k = 0; k < 4; ++k) {
      call.weights[k] = 0.5 - k * 0.3;
      if (k) call.history[k - 1] = history[size_t(k - 1)].bytes.data();
    }
  if (given) call.noise = noise.bytes.data();
  call.draws = !given, call.seed = 0x123456789abcull, call.offset = 77;
  call.t = t.data(), call.table = table.data();
  for (size_t k = 0; k < 3; ++k) call.found[k] = found[k].data();
  denoise_step(call);

  double unit = sizeof(T) == 8 ? 1e-14 : 4e-6;
  std::vector<double> results[3] = {numbers<T>(found[0], q.dtype), numbers<T>(found[1], q.dtype),
                                    numbers<T>(found[2], q.dtype)};
  for (int64_t b = 0; b < B; ++b)
    for (int64_t e = 0; e < size; ++e) {
      const double* c = &table[size_t(t[size_t(b)] * 12)];
      double o = out.at(b, e), sample = x.at(b, e);
      if (guided) o = out.at(B + b, e) + 2.5 * (o - out.at(B + b, e));
      double seen = c[10] * sample + c[11] * o;
      if (combined) o = 0.5 * seen + 0.2 * history[0].at(b, e) - 0.1 * history[1].at(b, e) - 0.4 * history[2].at(b, e);
      double x0 = c[0] * sample + c[1] * o;
      if (masked) {
        double m = mask.at(b, each ? e : e % q.inner);
        x0 = x0 * (1 - m) + image.at(b, e) * m;
      }
      double bound = threshold ? double(bounds[size_t(b)]) : 0.7;
      x0 = std::min(std::max(x0, -bound), bound) / (threshold ? bound : 1);
      double deviation = std::exp((c[5] + (learned ? c[6] * out.at(b, size + e) : 0)) / 2);
      double g = shifted ? shift.at(b, e) : 0, z = given ? noise.at(b, e) : normal_at(call.seed, uint32_t(b), 77, e);
      x0 += c[8] * g;
      double then = c[2] * x0 + c[3] * sample + c[4] * o + c[9] * deviation * deviation * g + c[7] * deviation * z;
      double truth[3] = {then, x0, seen}, scale = threshold ? 4 + 4 / bound : 8;
      for (int k = 0; k < 3; ++k)
        expect_close("denoise_step", results[k][size_t(b * size + e)], truth[k],
                     unit * scale + rounding_of(q.dtype, truth[k]));
    }
}

template <class T>
void check_diffusion_loss(const DiffusionCase& q) {
  bool learned = q.options & 2;
  int64_t B = q.batch, size = q.channels * q.inner, wide = learned ? 2 * size : size;
  Features out(q.dtype, B, wide, 5), noise(q.out_dtype, B, size, 0), x0(q.out_dtype, B, size, 0);
  Features gains(type_of<T>, 2, B, 0);
  // the first step's estimates are far from the floor of the likelihood
  std::vector<double> table = {0.9, -0.3, 0.7, 0.8, 0.4, 0.02, -4.5, 1, 1, 0, 1.7, 0.3, 0.9, 0, 0, 0};
  std::vector<int64_t> t;
  for (int64_t b = 0; b < B; ++b) t.push_back(b % 2);
  std::vector<T> squared(static_cast<size_t>(B)), bound(static_cast<size_t>(B));
  DiffusionLoss call;
  call.batch = B, call.channels = q.channels, call.inner = q.inner, call.threads = q.threads;
  call.out = {out.bytes.data(), q.dtype, out.stride}, call.noise = {noise.bytes.data(), q.out_dtype, size};
  call.x0 = {x0.bytes.data(), q.out_dtype, size};
  call.t = t.data(), call.table = table.data(), call.learned = learned;
  call.squared = squared.data(), call.bound = bound.data();
  diffusion_loss(call);
  int64_t bytes = q.dtype == DType::float64 ? 8 : q.dtype == DType::float32 ? 4 : 2;
  std::vector<char> d_out(size_t(B * wide * bytes));
  call.squared = gains.bytes.data(), call.bound = gains.bytes.data() + size_t(B) * sizeof(T), call.d_out = d_out.data();
  diffusion_loss_bwd(call);
  std::vector<double> gradient = numbers<T>(d_out, q.dtype);
  double unit = sizeof(T) == 8 ? 1e-12 : 4e-5;
  for (int64_t b = 0; b < B; ++b) {
    const double* c = &table[size_t(t[size_t(b)] * 8)];
    double squares = 0, bounds = 0, n = double(size);
    for (int64_t e = 0; e < size; ++e) {
      double d = out.at(b, e) - c[0] * noise.at(b, e) - c[1] * x0.at(b, e), slope = 0;
      squares += d * d;
      if (learned) {
        double u = c[3] + c[4] * out.at(b, size + e);
        auto value = [&](double level) {
          if (c[7] == 0) return (level - 1 + std::exp(-level) * (1 + c[2] * d * d)) / 2;
          double inverse = std::exp(-(level + c[6]) / 2), mass[2];
          for (int k = 0; k < 2; ++k) {
            double at = inverse * (c[5] * d + (k ? -1.0 : 1.0) / 255);
            mass[k] = (1 + std::tanh(std::sqrt(2 / M_PI) * (at + 0.044715 * at * at * at))) / 2;
          }
          double centre = x0.at(b, e);
          double p = centre < -0.999 ? mass[0] : centre > 0.999 ? 1 - mass[1] : mass[0] - mass[1];
          return -std::log(std::max(p, 1e-12));
        };
        bounds += value(u);
        slope = (value(u + 1e-5) - value(u - 1e-5)) / 2e-5 * c[4];
      }
      double truth = 2 * d / n * gains.at(0, b);
      expect_close("diffusion d_out", gradient[size_t(b * wide + e)], truth, unit / n + rounding_of(q.dtype, truth));
      if (!learned) continue;
      truth = slope / n / std::log(2.0) * gains.at(1, b);
      expect_close("diffusion d_variance", gradient[size_t(b * wide + size + e)], truth,
                   1e-4 / n + rounding_of(q.dtype, truth));
    }
    expect_close("diffusion mse", double(squared[size_t(b)]), squares / n, unit);
    expect_close("diffusion bound", double(bound[size_t(b)]), bounds / n / std::log(2.0), unit);
  }
}

void check_diffusion_family() {
  struct Size {
    int64_t batch, channels, inner;
  };
  for (Size s : {Size{1, 1, 1}, {3, 2, 7}, {2, 3, 64}, {5, 1, 33}, {2, 3, 1000}, {1, 4, 512}})
    for (int threads : {1, 3})
      for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
        for (int options : {0, 1, 3, 6, 14, 16, 34, 64, 128, 31, 255}) {
          DType other = options & 1 ? DType::float16 : dtype == DType::float64 ? DType::float64 : DType::float32;
          DiffusionCase c{dtype, other, s.batch, s.channels, s.inner, options, threads};
          if (dtype == DType::float64) {
            check_denoise<double>(c);
            check_diffusion_loss<double>(c);
          } else {
            check_denoise<float>(c);
            check_diffusion_loss<float>(c);
          }
        }
}

}  // namespace
