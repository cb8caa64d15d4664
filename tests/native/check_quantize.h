// The quantize kernels' part of check_native.cpp: both layouts, every element type and every set of wanted results on
// small odd shapes, outputs in buffers of exactly their size, against the plain formulae in double.
#pragma once
#include "../../csrc/common/philox.h"
#include "../../csrc/cpu/quantize.h"

namespace {

double gumbel_of(uint32_t word) {
  bool low = word < 0x80000000u;
  double t = (double(low ? word : ~word) + 0.5) * 0x1p-32;
  return -std::log(low ? -std::log1p(-t) : -std::log(t));
}

double gumbel_at(uint64_t seed, uint64_t row, int64_t entry) {
  uint32_t words[4] = {uint32_t(row), uint32_t(row >> 32), uint32_t(entry / 4), 0x67756D62u};
  philox(seed, words);
  return gumbel_of(words[entry & 3]);
}

// Numbers [batch, positions, entries] behind either layout, with a gap behind each row.
struct GridData {
  bool entries_first;
  int64_t positions, entries;
  Features data;
  GridData(DType dtype, bool first, int64_t batch, int64_t p, int64_t v)
      : entries_first(first), positions(p), entries(v), data(dtype, batch * (first ? v : p), first ? p : v, 3) {}
  Grid grid() const {
    int64_t row = data.stride;
    if (entries_first) return {data.bytes.data(), data.dtype, entries * row, 1, row};
    return {data.bytes.data(), data.dtype, positions * row, row, 1};
  }
  double at(int64_t b, int64_t p, int64_t v) const {
    return entries_first ? data.at(b * entries + v, p) : data.at(b * positions + p, v);
  }
};

struct QuantizeCase {
  DType dtype;
  int64_t batch, positions, vocabulary, width;
  bool entries_first, gradient_entries_first;
  int noise;   // 0: none, 1: drawn, 2: given
  int wanted;  // 1: z, 2: divergence, 4: a chosen entry's term
  int threads;
};

template <class T>
void check_quantize(const QuantizeCase& q) {
  int64_t N = q.batch * q.positions, V = q.vocabulary, D = q.width;
  bool soft = q.wanted & 1, divergence = q.wanted & 2, chosen = q.wanted & 4;
  DType wide = type_of<T>;
  GridData logits(q.dtype, q.entries_first, q.batch, q.positions, V), given(wide, !q.entries_first, q.batch, q.positions, V);
  Features codebook(wide, V, D, 0), up(wide, N, D, 0);
  double tau = 0.7, gain = 1.3, kl = divergence ? 0.4 : 0, plain_gain = chosen ? 0.5 : 0;
  std::vector<T> z(size_t(N * D)), lse(static_cast<size_t>(N)), plain(static_cast<size_t>(N)),
      expected(static_cast<size_t>(N));
  std::vector<int64_t> indices(static_cast<size_t>(N));
  Quantize call;
  call.batch = q.batch, call.positions = q.positions, call.vocabulary = V, call.width = D;
  call.logits = logits.grid(), call.draws = q.noise == 1, call.seed = 0x123456789abcull, call.offset = 0xfffffffeull;
  if (q.noise == 2) call.given = given.grid();
  call.codebook = codebook.bytes.data(), call.tau = tau, call.threads = q.threads;
  call.z = soft ? z.data() : nullptr, call.indices = indices.data(), call.lse = soft ? lse.data() : nullptr;
  if (divergence || chosen) call.plain = plain.data(), call.expected = expected.data();
  quantize_fwd(call);

  int64_t size = q.dtype == DType::float64 ? 8 : q.dtype == DType::float32 ? 4 : 2;
  std::vector<char> d_logits(size_t(N * V * size));
  std::vector<T> d_codebook(size_t(V * D)), lse_in(static_cast<size_t>(N)), plain_in(static_cast<size_t>(N)),
      expected_in(static_cast<size_t>(N)), code(size_t(N * D)), plain_code(size_t(N * D));
  std::vector<double> true_code(size_t(V * D)), code_size(size_t(V * D));
  std::vector<double> y(size_t(N * V)), p(size_t(N * V)), l(size_t(N * V));
  double unit = q.dtype == DType::float64 ? 1e-13 : 4e-6, tolerance = unit * double(4 + D) * std::sqrt(double(V + 4));
  for (int64_t n = 0; n < N; ++n) {
    int64_t b = n / q.positions, at = n % q.positions;
    double top = -1e300, total = 0, plain_total = 0, moment = 0;
    int64_t best = 0;
    double* s = &y[size_t(n * V)];
    for (int64_t v = 0; v < V; ++v) {
      l[size_t(n * V + v)] = logits.at(b, at, v);
      double g = q.noise == 1   ? gumbel_at(call.seed, call.offset + uint64_t(n), v)
                 : q.noise == 2 ? given.at(b, at, v)
                                : 0;
      s[v] = (l[size_t(n * V + v)] + g) / tau;
      if (s[v] > top) top = s[v], best = v;
    }
    for (int64_t v = 0; v < V; ++v) {
      total += std::exp(s[v] - top), plain_total += std::exp(l[size_t(n * V + v)]);
      moment += std::exp(l[size_t(n * V + v)]) * l[size_t(n * V + v)];
    }
    double norm = top + std::log(total), plain_norm = std::log(plain_total);
    expect_close("quantize index", s[indices[size_t(n)]], s[best], tolerance);
    if (soft) expect_close("quantize lse", double(lse[size_t(n)]), norm, tolerance);
    if (divergence || chosen) {
      expect_close("quantize plain lse", double(plain[size_t(n)]), plain_norm, tolerance);
      expect_close("quantize expected", double(expected[size_t(n)]), moment / plain_total, tolerance);
    }
    lse_in[size_t(n)] = T(norm), plain_in[size_t(n)] = T(plain_norm), expected_in[size_t(n)] = T(moment / plain_total);
    for (int64_t v = 0; v < V; ++v) {
      s[v] = std::exp(s[v] - norm);
      p[size_t(n * V + v)] = std::exp(l[size_t(n * V + v)] - plain_norm);
    }
    for (int64_t e = 0; e < D; ++e) {
      double sum = 0, plain_sum = 0;
      for (int64_t v = 0; v < V; ++v)
        sum += s[v] * codebook.at(v, e), plain_sum += p[size_t(n * V + v)] * codebook.at(v, e);
      if (soft) expect_close("quantize z", double(z[size_t(n * D + e)]), sum, tolerance);
      code[size_t(n * D + e)] = T(sum), plain_code[size_t(n * D + e)] = T(plain_sum);
    }
  }

  QuantizeBackward back;
  back.call = call;
  back.call.z = nullptr, back.call.indices = chosen ? indices.data() : nullptr, back.call.lse = lse_in.data();
  back.call.plain = plain_in.data(), back.call.expected = expected_in.data();
  back.d_z = up.bytes.data(), back.mean_code = code.data(), back.plain_code = plain_code.data();
  back.gain = gain, back.kl = kl, back.plain_gain = plain_gain;
  if (q.gradient_entries_first)
    back.d_logits = {d_logits.data(), q.dtype, q.positions * V, 1, q.positions};
  else
    back.d_logits = {d_logits.data(), q.dtype, q.positions * V, V, 1};
  back.d_codebook = chosen ? nullptr : d_codebook.data();
  quantize_bwd(back);
  std::vector<double> found = numbers<T>(d_logits, q.dtype);
  double rounding = q.dtype == DType::bfloat16 ? 0x1p-8 : q.dtype == DType::float16 ? 0x1p-10 : 0;
  for (int64_t n = 0; n < N; ++n) {
    double mean = 0, plain_mean = 0;
    std::vector<double> x(size_t(V), 0.0);
    for (int64_t e = 0; e < D; ++e)
      mean += up.at(n, e) * double(code[size_t(n * D + e)]), plain_mean += up.at(n, e) * double(plain_code[size_t(n * D + e)]);
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t e = 0; e < D; ++e) x[size_t(v)] += up.at(n, e) * codebook.at(v, e);
      double weight = y[size_t(n * V + v)], other = p[size_t(n * V + v)];
      double truth = gain * weight * (x[size_t(v)] - mean) +
                     other * (kl * (l[size_t(n * V + v)] - double(expected_in[size_t(n)])) -
                              plain_gain * (x[size_t(v)] - plain_mean));
      if (chosen && indices[size_t(n)] == v) truth += x[size_t(v)] - mean;
      int64_t b = n / q.positions, at = n % q.positions;
      size_t where = size_t(q.gradient_entries_first ? (b * V + v) * q.positions + at : n * V + v);
      expect_close("quantize d_logits", found[where], truth, 4 * tolerance + rounding * std::abs(truth) + rounding / 64);
      for (int64_t e = 0; e < D; ++e) {
        true_code[size_t(v * D + e)] += weight * up.at(n, e);
        code_size[size_t(v * D + e)] += std::abs(weight * up.at(n, e));
      }
    }
  }
  for (size_t at = 0; at < d_codebook.size() && !chosen; ++at)
    expect_close("quantize d_codebook", double(d_codebook[at]), true_code[at], tolerance * (1 + code_size[at]));
}

template <class T>
void check_encode(DType dtype, bool entries_first, int64_t batch, int64_t positions, int64_t V, int64_t C, bool biased) {
  GridData features(dtype, entries_first, batch, positions, C);
  Features weight(type_of<T>, V, C, 0), bias(type_of<T>, 1, V, 0);
  std::vector<int64_t> indices(size_t(batch * positions));
  encode_indices({batch, positions, V, C, features.grid(), weight.bytes.data(), biased ? bias.bytes.data() : nullptr,
                  sizeof(T) == 8, indices.data(), 2});
  for (int64_t n = 0; n < batch * positions; ++n) {
    double best = -1e300, mine = -1e300;
    for (int64_t v = 0; v < V; ++v) {
      double score = biased ? bias.at(0, v) : 0;
      for (int64_t e = 0; e < C; ++e) score += weight.at(v, e) * features.at(n / positions, n % positions, e);
      best = std::max(best, score);
      if (indices[size_t(n)] == v) mine = score;
    }
    expect_close("encode_indices", mine, best, dtype == DType::float64 ? 0 : 1e-6 * double(C + 1));
  }
}

template <class T>
void check_noise(int64_t rows, int64_t vocabulary, uint64_t offset) {
  std::vector<T> noise(size_t(rows * vocabulary));
  gumbel_noise(rows, vocabulary, 77, offset, sizeof(T) == 8, noise.data(), 2);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t v = 0; v < vocabulary; ++v) {
      double truth = gumbel_at(77, offset + uint64_t(n), v);
      expect_close("gumbel_noise", double(noise[size_t(n * vocabulary + v)]), truth,
                   (sizeof(T) == 8 ? 1e-14 : 1e-6) * (1 + std::abs(truth)));
    }
}

void check_quantize_family() {
  struct Shape {
    int64_t batch, positions, vocabulary, width;
  };
  for (Shape s : {Shape{1, 1, 1, 1}, {2, 3, 5, 2}, {1, 17, 33, 20}, {2, 19, 130, 7}, {1, 130, 35, 33}, {3, 1, 129, 16}})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
      for (int option = 0; option < 24; ++option) {
        QuantizeCase q{dtype, s.batch, s.positions, s.vocabulary, s.width, option % 2 == 0, option % 4 < 2,
                       option % 3, option % 8, option % 5 < 2 ? 1 : 3};
        if (dtype == DType::float64)
          check_quantize<double>(q);
        else
          check_quantize<float>(q);
      }
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
    for (bool first : {false, true})
      for (bool biased : {false, true})
        for (Shape s : {Shape{1, 1, 1, 1}, {2, 5, 130, 17}, {1, 131, 20, 33}, {1, 3, 7, 0}}) {
          if (dtype == DType::float64)
            check_encode<double>(dtype, first, s.batch, s.positions, s.vocabulary, s.width, biased);
          else
            check_encode<float>(dtype, first, s.batch, s.positions, s.vocabulary, s.width, biased);
        }
  for (int64_t vocabulary : {1, 4, 37}) {
    check_noise<float>(33, vocabulary, 0xfffffff0ull);
    check_noise<double>(5, vocabulary, 3);
  }
}

}  // namespace
