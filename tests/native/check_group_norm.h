// The group_norm kernels' part of check_native.cpp: every element type and option on small odd shapes and on rows of
// several chunks, outputs in buffers of exactly their size, against the plain formulae in double.
#pragma once
#include "../../csrc/cpu/group_norm.h"

namespace {

struct GroupNormCase {
  DType dtype;
  int64_t batch, channels, spatial, groups;
  bool modulated, silu;
  int threads;
};

template <class T>
void check_group_norm(const GroupNormCase& q) {
  int64_t B = q.batch, C = q.channels, S = q.spatial, G = q.groups, each = C / G;
  DType wide = type_of<T>;
  Features x(q.dtype, B * C, S, 3), up(q.dtype, B * C, S, 1);
  Features weight(wide, 1, C, 0), bias(wide, 1, C, 0), scale(wide, B, C, 2), shift(wide, B, C, 5);
  int64_t bytes = q.dtype == DType::float64 ? 8 : q.dtype == DType::float32 ? 4 : 2;
  std::vector<char> out(size_t(B * C * S * bytes)), d_x(size_t(B * C * S * bytes));
  std::vector<double> mean(size_t(B * G)), rstd(size_t(B * G));
  std::vector<T> d_weight(static_cast<size_t>(C)), d_bias(static_cast<size_t>(C)), d_scale(size_t(B * C)),
      d_shift(size_t(B * C));
  GroupNorm call;
  call.dtype = q.dtype, call.batch = B, call.channels = C, call.spatial = S, call.groups = G;
  call.x = {x.bytes.data(), C * x.stride, x.stride};
  call.weight = weight.bytes.data(), call.bias = bias.bytes.data();
  if (q.modulated) {
    call.scale = scale.bytes.data(), call.shift = shift.bytes.data();
    call.scale_batch = scale.stride, call.shift_batch = shift.stride;
  }
  call.eps = 1e-3, call.silu = q.silu, call.threads = q.threads, call.mean = mean.data(), call.rstd = rstd.data();
  call.out = {out.data(), C * S, S};
  group_norm_fwd(call);
  GroupNormBackward back;
  back.forward = call;
  back.forward.out = {up.bytes.data(), C * up.stride, up.stride};
  back.d_x = {d_x.data(), C * S, S};
  back.d_weight = d_weight.data(), back.d_bias = d_bias.data();
  if (q.modulated) back.d_scale = d_scale.data(), back.d_shift = d_shift.data();
  group_norm_bwd(back);

  std::vector<double> y = numbers<T>(out, q.dtype), dx = numbers<T>(d_x, q.dtype);
  double rounding = q.dtype == DType::bfloat16 ? 0x1p-8 : q.dtype == DType::float16 ? 0x1p-10 : 0;
  double unit = sizeof(T) == 8 ? 1e-12 : 1e-5, n = double(each * S);
  std::vector<double> true_weight(static_cast<size_t>(C)), true_bias(static_cast<size_t>(C));
  for (int64_t b = 0; b < B; ++b)
    for (int64_t g = 0; g < G; ++g) {
      double sum = 0, square = 0;
      auto at = [&](int64_t c, int64_t s) { return x.at(b * C + c, s); };
      for (int64_t c = g * each; c < (g + 1) * each; ++c)
        for (int64_t s = 0; s < S; ++s) sum += at(c, s);
      double middle = sum / n;
      for (int64_t c = g * each; c < (g + 1) * each; ++c)
        for (int64_t s = 0; s < S; ++s) square += (at(c, s) - middle) * (at(c, s) - middle);
      double spread = 1 / std::sqrt(square / n + 1e-3);
      expect_close("group_norm mean", mean[size_t(b * G + g)], middle, unit);
      expect_close("group_norm rstd", rstd[size_t(b * G + g)], spread, 10 * unit * spread);
      double first = 0, second = 0;
      std::vector<double> gradient(size_t(each * S));
      for (int64_t c = g * each; c < (g + 1) * each; ++c) {
        double by = q.modulated ? 1 + scale.at(b, c) : 1, plus = q.modulated ? shift.at(b, c) : 0, total = 0, weighted = 0;
        for (int64_t s = 0; s < S; ++s) {
          double normal = (at(c, s) - middle) * spread;
          double z = (normal * weight.at(0, c) + bias.at(0, c)) * by + plus, share = 1 / (1 + std::exp(-z));
          double value = q.silu ? z * share : z, d = up.at(b * C + c, s) * (q.silu ? share * (1 + z * (1 - share)) : 1);
          expect_close("group_norm out", y[size_t((b * C + c) * S + s)], value,
                       8 * unit + rounding * std::abs(value) + rounding / 64);
          total += d, weighted += d * normal;
          gradient[size_t((c - g * each) * S + s)] = d * weight.at(0, c) * by;
        }
        first += total * weight.at(0, c) * by, second += weighted * weight.at(0, c) * by;
        true_weight[size_t(c)] += weighted * by, true_bias[size_t(c)] += total * by;
        if (!q.modulated) continue;
        expect_close("group_norm d_scale", double(d_scale[size_t(b * C + c)]),
                     weight.at(0, c) * weighted + bias.at(0, c) * total, unit * (10 + double(S)));
        expect_close("group_norm d_shift", double(d_shift[size_t(b * C + c)]), total, unit * (10 + double(S)));
      }
      for (int64_t c = g * each; c < (g + 1) * each; ++c)
        for (int64_t s = 0; s < S; ++s) {
          double normal = (at(c, s) - middle) * spread;
          double truth = spread * (gradient[size_t((c - g * each) * S + s)] - first / n - normal * second / n);
          expect_close("group_norm d_x", dx[size_t((b * C + c) * S + s)], truth,
                       unit * (10 + 4 * spread) + rounding * std::abs(truth) + rounding / 64);
        }
    }
  for (int64_t c = 0; c < C; ++c) {
    double tolerance = unit * (10 + double(B * S));
    expect_close("group_norm d_weight", double(d_weight[size_t(c)]), true_weight[size_t(c)], tolerance);
    expect_close("group_norm d_bias", double(d_bias[size_t(c)]), true_bias[size_t(c)], tolerance);
  }
}

void check_group_norm_family() {
  struct Size {
    int64_t batch, channels, spatial, groups;
  };
  for (Size s : {Size{1, 1, 1, 1}, {2, 6, 5, 3}, {3, 8, 64, 2}, {1, 4, 5000, 2}, {2, 130, 9, 1}, {1, 2, 4099, 1}})
    for (int threads : {1, 3})
      for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
        for (int option = 0; option < 4; ++option) {
          GroupNormCase c{dtype, s.batch, s.channels, s.spatial, s.groups, (option & 1) != 0, (option & 2) != 0, threads};
          if (dtype == DType::float64)
            check_group_norm<double>(c);
          else
            check_group_norm<float>(c);
        }
}

}  // namespace
