// The attention kernels' part of check_native.cpp: every option on small odd shapes, outputs in buffers of exactly
// their size, against the plain formulae in double.
#pragma once
#include "../../csrc/common/philox.h"
#include "../../csrc/cpu/attention.h"

namespace {

// Rows [batch, length, heads, width] with a gap behind each position.
struct Tokens {
  int64_t length, heads, width, row;
  Features data;
  Tokens(DType dtype, int64_t batch, int64_t s, int64_t h, int64_t d)
      : length(s), heads(h), width(d), row(h * d + 3), data(dtype, batch * s, h * d, 3) {}
  Stream stream(bool packed = false) const { return {data.bytes.data(), packed ? 0 : length * row, row, width}; }
  double at(int64_t token, int64_t h, int64_t e) const { return data.at(token, h * width + e); }
};

template <class T>
std::vector<double> numbers(const std::vector<char>& bytes, DType dtype) {
  std::vector<double> found;
  int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  for (size_t at = 0; at < bytes.size(); at += size_t(size)) {
    if (size == 8) {
      double value;
      memcpy(&value, &bytes[at], 8), found.push_back(value);
    } else if (size == 4) {
      float value;
      memcpy(&value, &bytes[at], 4), found.push_back(double(value));
    } else {
      uint16_t half;
      memcpy(&half, &bytes[at], 2);
      found.push_back(double(dtype == DType::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half)));
    }
  }
  return found;
}

double kept(uint64_t seed, int64_t unit, uint32_t direction, int64_t row, int64_t column, double rate) {
  if (rate == 0) return 1;
  uint32_t words[4] = {uint32_t(unit), direction, uint32_t(row), uint32_t(column >> 2)};
  philox(seed, words);
  return words[column & 3] >= dropout_threshold(rate) ? 1 / (1 - rate) : 0;
}

struct AttentionCase {
  DType dtype;
  int64_t batch, sq, sk, heads, d, dv;
  int option, threads;
};

template <class T>
void check_attention(const AttentionCase& a) {
  enum {
    lengths = 1,
    holes = 2,
    plane = 4,
    biased = 8,
    causal = 16,
    dropped = 32,
    paired = 64,
    packed = 128,
    keeping = 256
  };
  auto has = [&](int what) { return (a.option & what) != 0; };
  int64_t sequences = has(paired) ? 4 : a.batch, B = sequences, H = a.heads;
  Tokens q(a.dtype, a.batch, a.sq, H, a.d), k(a.dtype, a.batch, a.sk, H, a.d), v(a.dtype, a.batch, a.sk, H, a.dv);
  int64_t outs = has(packed) ? a.batch : B;
  Tokens up(a.dtype, outs, a.sq, H, a.dv);
  std::vector<int64_t> lengths_q, lengths_k, pair_q, pair_k, cu_q{0}, cu_k{0};
  for (int64_t b = 0; b < a.batch; ++b) {
    lengths_q.push_back(has(lengths) ? (a.sq * (b + 1)) / (a.batch + 1) : a.sq);
    lengths_k.push_back(has(lengths) ? (a.sk * (a.batch - b)) / (a.batch + 1) : a.sk);
    cu_q.push_back(cu_q.back() + lengths_q.back());
    cu_k.push_back(cu_k.back() + lengths_k.back());
  }
  for (int64_t p = 0; p < sequences; ++p) pair_q.push_back(p % a.batch), pair_k.push_back((p / 2) % a.batch);
  std::vector<uint8_t> key_mask, mask;
  for (int64_t at = 0; at < a.batch * a.sk; ++at) key_mask.push_back(uniform() < 0.4);
  for (int64_t at = 0; at < B * a.sq * a.sk; ++at) mask.push_back(uniform() < 0.4);
  std::vector<T> bias;
  for (int64_t at = 0; at < H * a.sq * a.sk; ++at) bias.push_back(T(uniform()));

  Attention c;
  c.dtype = a.dtype, c.sequences = sequences, c.heads = H, c.sq = a.sq, c.sk = a.sk, c.d = a.d, c.dv = a.dv;
  c.batch_q = c.batch_k = a.batch, c.length_q = a.sq, c.length_k = a.sk, c.scale = 0.4;
  if (has(packed)) c.batch_q = a.batch * a.sq, c.batch_k = a.batch * a.sk, c.cu_q = cu_q.data(), c.cu_k = cu_k.data();
  c.query = q.stream(has(packed)), c.key = k.stream(has(packed)), c.value = v.stream(has(packed));
  if (has(lengths) && !has(packed)) c.lengths_q = lengths_q.data(), c.lengths_k = lengths_k.data();
  if (has(paired)) c.pair_q = pair_q.data(), c.pair_k = pair_k.data();
  if (has(holes)) c.key_mask = key_mask.data(), c.key_mask_batch = has(packed) ? 0 : a.sk, c.key_mask_column = 1;
  if (has(plane)) c.mask = {mask.data(), a.sq * a.sk, 0, a.sk, 1};
  DType wide = sizeof(T) == 8 ? DType::float64 : DType::float32;
  if (has(biased)) c.bias = {bias.data(), 0, a.sq * a.sk, a.sk, 1}, c.bias_dtype = wide;
  c.causal = has(causal);
  if (has(dropped)) c.dropout = 0.3, c.seed = 0x123456789abcull, c.direction = 1;
  int64_t size = a.dtype == DType::float64 ? 8 : a.dtype == DType::float32 ? 4 : 2;
  std::vector<char> out(size_t(outs * a.sq * H * a.dv * size)), probs(size_t(B * H * a.sq * a.sk * size));
  std::vector<T> lse(size_t(outs * H * a.sq)), store(size_t(B * H * a.sk * ((a.sq + 15) / 16 * 16)));
  c.out = out.data(), c.lse = lse.data(), c.probs = has(packed) ? nullptr : probs.data();
  c.kept = has(keeping) && !has(packed) ? store.data() : nullptr;
  const Attention* calls[] = {&c, &c};
  expect_close("attention status", attention_fwd(calls, 1, a.threads), 0, 0);

  bool shared = has(paired);
  DType gradient = shared ? wide : a.dtype;
  int64_t gradient_size = shared ? int64_t(sizeof(T)) : size;
  std::vector<char> d_q(size_t(a.batch * a.sq * H * a.d * gradient_size)),
      d_k(size_t(a.batch * a.sk * H * a.d * gradient_size)), d_v(size_t(a.batch * a.sk * H * a.dv * gradient_size));
  std::vector<T> d_bias(bias.size());
  c.d_out = up.stream(has(packed)), c.d_query = d_q.data(), c.d_key = d_k.data(), c.d_value = d_v.data();
  c.gradient_dtype = gradient;
  if (has(biased)) {
    c.d_bias = d_bias.data();
    int64_t shape[] = {1, H, a.sq, a.sk};
    std::copy(shape, shape + 4, c.bias_shape);
  }
  expect_close("attention status", attention_bwd(calls, 1, a.threads), 0, 0);

  std::vector<double> found = numbers<T>(out, a.dtype), found_p = numbers<T>(probs, a.dtype);
  std::vector<double> true_q(size_t(a.batch * a.sq * H * a.d)), true_k(size_t(a.batch * a.sk * H * a.d)),
      true_v(size_t(a.batch * a.sk * H * a.dv)), true_bias(bias.size());
  // a 16-bit result is rounded once, and so is each of its gradients
  double unit = a.dtype == DType::float64    ? 1e-13
                : a.dtype == DType::float32  ? 2e-6
                : a.dtype == DType::bfloat16 ? 0x1p-8
                                             : 0x1p-11;
  double tolerance = unit * 4 * double(1 + a.d + a.dv),
         gradient_tolerance = tolerance * std::sqrt(double(B * (a.sq + a.sk)));
  for (int64_t s = 0; s < sequences; ++s)
    for (int64_t h = 0; h < H; ++h) {
      int64_t bq = has(paired) ? pair_q[size_t(s)] : s, bk = has(paired) ? pair_k[size_t(s)] : s;
      int64_t nq = lengths_q[size_t(bq)], nk = lengths_k[size_t(bk)];
      int64_t q0 = has(packed) ? cu_q[size_t(s)] : bq * a.sq, k0 = has(packed) ? cu_k[size_t(s)] : bk * a.sk;
      int64_t o0 = has(packed) ? q0 : s * a.sq;
      for (int64_t i = 0; i < (has(packed) ? nq : a.sq); ++i) {
        std::vector<double> p(size_t(a.sk), 0.0), x(size_t(a.sk), 0.0), factor(size_t(a.sk), 1.0),
            dp(size_t(a.sk), 0.0);
        std::vector<bool> live(size_t(a.sk), false);
        double top = -1e300, total = 0, inner = 0;
        for (int64_t j = 0; j < nk && i < nq; ++j) {
          bool seen = !(has(holes) && !key_mask[size_t(has(packed) ? k0 + j : bk * a.sk + j)]) &&
                      !(has(plane) && !mask[size_t((s * a.sq + i) * a.sk + j)]) && !(has(causal) && j > i + nk - nq);
          if (!seen) continue;
          live[size_t(j)] = true;
          for (int64_t e = 0; e < a.d; ++e) x[size_t(j)] += q.at(q0 + i, h, e) * k.at(k0 + j, h, e);
          x[size_t(j)] = 0.4 * x[size_t(j)] + (has(biased) ? double(bias[size_t((h * a.sq + i) * a.sk + j)]) : 0);
          top = std::max(top, x[size_t(j)]);
          if (has(dropped)) factor[size_t(j)] = kept(c.seed, s * H + h, 1, i, j, 0.3);
        }
        for (int64_t j = 0; j < nk; ++j)
          if (live[size_t(j)]) total += p[size_t(j)] = std::exp(x[size_t(j)] - top);
        for (int64_t j = 0; j < nk; ++j)
          if (live[size_t(j)]) p[size_t(j)] /= total;
        for (int64_t e = 0; e < a.dv; ++e) {
          double truth = 0;
          for (int64_t j = 0; j < nk; ++j)
            if (live[size_t(j)]) truth += p[size_t(j)] * factor[size_t(j)] * v.at(k0 + j, h, e);
          expect_close("attention out", found[size_t(((o0 + i) * H + h) * a.dv + e)], truth, tolerance);
        }
        double true_lse = total > 0 ? top + std::log(total) : -std::numeric_limits<double>::infinity();
        expect_close("attention lse", double(lse[size_t(has(packed) ? (q0 + i) * H + h : (s * H + h) * a.sq + i)]),
                     true_lse, tolerance);
        for (int64_t j = 0; j < a.sk && !has(packed); ++j)
          expect_close("attention probs", found_p[size_t(((s * H + h) * a.sq + i) * a.sk + j)], p[size_t(j)],
                       tolerance);
        for (int64_t j = 0; j < nk; ++j)
          if (live[size_t(j)]) {
            for (int64_t e = 0; e < a.dv; ++e) dp[size_t(j)] += up.at(o0 + i, h, e) * v.at(k0 + j, h, e);
            dp[size_t(j)] *= factor[size_t(j)];
            inner += p[size_t(j)] * dp[size_t(j)];
          }
        for (int64_t j = 0; j < nk; ++j)
          if (live[size_t(j)]) {
            double ds = p[size_t(j)] * (dp[size_t(j)] - inner);
            if (has(biased)) true_bias[size_t((h * a.sq + i) * a.sk + j)] += ds;
            for (int64_t e = 0; e < a.d; ++e) {
              true_q[size_t(((q0 + i) * H + h) * a.d + e)] += 0.4 * ds * k.at(k0 + j, h, e);
              true_k[size_t(((k0 + j) * H + h) * a.d + e)] += 0.4 * ds * q.at(q0 + i, h, e);
            }
            for (int64_t e = 0; e < a.dv; ++e)
              true_v[size_t(((k0 + j) * H + h) * a.dv + e)] += p[size_t(j)] * factor[size_t(j)] * up.at(o0 + i, h, e);
          }
      }
    }
  auto compare = [&](const char* what, const std::vector<double>& ours, const std::vector<double>& truth) {
    for (size_t at = 0; at < truth.size(); ++at) expect_close(what, ours[at], truth[at], gradient_tolerance);
  };
  compare("attention d_query", numbers<T>(d_q, gradient), true_q);
  compare("attention d_key", numbers<T>(d_k, gradient), true_k);
  compare("attention d_value", numbers<T>(d_v, gradient), true_v);
  if (has(biased)) compare("attention d_bias", std::vector<double>(d_bias.begin(), d_bias.end()), true_bias);
}

// The two softmaxes are the columns and rows of one matrix, so the one-direction kernel is the truth of the shared one.
template <class T>
void check_bi_attention(DType dtype, int64_t sb, int64_t sa, int64_t d, bool masked, int threads) {
  const int64_t B = 2, H = 2;
  Tokens q(dtype, B, sb, H, d), k(dtype, B, sa, H, d), va(dtype, B, sa, H, d + 1), vb(dtype, B, sb, H, d + 2);
  Tokens up_a(dtype, B, sa, H, d + 2), up_b(dtype, B, sb, H, d + 1);
  std::vector<uint8_t> mask_a, mask_b;
  for (int64_t at = 0; at < B * sa; ++at) mask_a.push_back(uniform() < 0.5);
  for (int64_t at = 0; at < B * sb; ++at) mask_b.push_back(uniform() < 0.5);
  int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  auto room = [&](const Tokens& t, int64_t width) {
    return std::vector<char>(size_t(B * t.length * H * width * size));
  };
  std::vector<char> out_a = room(k, d + 2), out_b = room(q, d + 1), d_q = room(q, d), d_k = room(k, d),
                    d_va = room(va, d + 1), d_vb = room(vb, d + 2);
  std::vector<T> lse_a(size_t(B * H * sa)), lse_b(size_t(B * H * sb)), stats_a(2 * lse_a.size()),
      stats_b(2 * lse_b.size());
  std::vector<T> d_lse_a(lse_a.size()), d_lse_b(lse_b.size());
  BiAttention c;
  c.dtype = dtype, c.batch = B, c.heads = H, c.sa = sa, c.sb = sb, c.d = d, c.dv_a = d + 1, c.dv_b = d + 2,
  c.scale = 0.5;
  c.query_b = q.stream(), c.key_a = k.stream(), c.value_a = va.stream(), c.value_b = vb.stream();
  c.dropout_a = 0.2, c.dropout_b = 0.1, c.seed = 77;
  if (masked) c.mask_a = mask_a.data(), c.mask_b = mask_b.data();
  c.out_a = out_a.data(), c.out_b = out_b.data(), c.lse_a = lse_a.data(), c.lse_b = lse_b.data();
  c.stats_a = stats_a.data(), c.stats_b = stats_b.data();
  expect_close("bi_attention status", bi_attention_fwd(c, threads), 0, 0);
  c.d_out_a = up_a.stream(), c.d_out_b = up_b.stream(), c.d_lse_a = d_lse_a.data(), c.d_lse_b = d_lse_b.data();
  c.d_query_b = d_q.data(), c.d_key_a = d_k.data(), c.d_value_a = d_va.data(), c.d_value_b = d_vb.data();
  expect_close("bi_attention status", bi_attention_bwd(c, threads), 0, 0);

  // direction 0: queries a over keys b; direction 1: queries b over keys a
  double tolerance = (dtype == DType::float64 ? 1e-12 : dtype == DType::float32 ? 1e-5 : 0x1p-6) * double(4 + d);
  std::vector<double> sum_q(size_t(B * sb * H * d)), sum_k(size_t(B * sa * H * d));
  for (int direction = 0; direction < 2; ++direction) {
    bool first = direction == 0;
    const Tokens &query = first ? k : q, &key = first ? q : k, &value = first ? vb : va, &up = first ? up_a : up_b;
    std::vector<char> out = room(query, value.width), d_query = room(query, d), d_key = room(key, d),
                      d_value = room(key, value.width);
    std::vector<int64_t> rows;
    Attention one;
    one.dtype = dtype, one.sequences = B, one.heads = H, one.sq = query.length, one.sk = key.length, one.d = d,
    one.dv = value.width;
    one.batch_q = one.batch_k = B, one.length_q = query.length, one.length_k = key.length, one.scale = 0.5;
    one.query = query.stream(), one.key = key.stream(), one.value = value.stream(), one.d_out = up.stream();
    one.dropout = first ? 0.2 : 0.1, one.seed = 77, one.direction = uint32_t(direction);
    std::vector<uint8_t> both;
    if (masked) {
      for (int64_t b = 0; b < B; ++b)
        for (int64_t i = 0; i < one.sq; ++i)
          for (int64_t j = 0; j < one.sk; ++j)
            both.push_back((first ? mask_a : mask_b)[size_t(b * one.sq + i)] &&
                           (first ? mask_b : mask_a)[size_t(b * one.sk + j)]);
      one.mask = {both.data(), one.sq * one.sk, 0, one.sk, 1};
    }
    one.out = out.data(), one.d_query = d_query.data(), one.d_key = d_key.data(), one.d_value = d_value.data();
    one.gradient_dtype = dtype;
    const Attention* calls[] = {&one};
    attention_fwd(calls, 1, 1);
    attention_bwd(calls, 1, 1);
    auto compare = [&](const char* what, const std::vector<char>& ours, const std::vector<char>& truth) {
      std::vector<double> mine = numbers<T>(ours, dtype), theirs = numbers<T>(truth, dtype);
      for (size_t at = 0; at < mine.size(); ++at) expect_close(what, mine[at], theirs[at], tolerance);
    };
    compare("bi_attention out", first ? out_a : out_b, out);
    compare("bi_attention d_value", first ? d_vb : d_va, d_value);
    std::vector<double> by_query = numbers<T>(d_query, dtype), by_key = numbers<T>(d_key, dtype);
    for (size_t at = 0; at < by_query.size(); ++at) (first ? sum_k : sum_q)[at] += by_query[at];
    for (size_t at = 0; at < by_key.size(); ++at) (first ? sum_q : sum_k)[at] += by_key[at];
  }
  std::vector<double> mine = numbers<T>(d_q, dtype);
  for (size_t at = 0; at < mine.size(); ++at) expect_close("bi_attention d_query", mine[at], sum_q[at], 4 * tolerance);
  mine = numbers<T>(d_k, dtype);
  for (size_t at = 0; at < mine.size(); ++at) expect_close("bi_attention d_key", mine[at], sum_k[at], 4 * tolerance);
}

void check_attention_family() {
  struct Shape {
    int64_t batch, sq, sk, heads, d, dv;
  };
  for (Shape s : {Shape{1, 1, 1, 1, 1, 1},
                  {2, 5, 3, 2, 3, 2},
                  {3, 17, 33, 1, 16, 20},
                  {2, 35, 19, 2, 7, 33},
                  {1, 0, 4, 1, 2, 2},
                  {2, 4, 0, 1, 2, 3},
                  {1, 70, 40, 1, 5, 5}})
    for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
      for (int option :
           {0, 1, 2, 3, 4, 5, 8, 13, 16, 17, 32, 35, 52, 64, 67, 72, 108, 128, 129, 163, 145, 256, 259, 300})
        for (int threads : {1, 3}) {
          AttentionCase a{dtype, s.batch, s.sq, s.sk, s.heads, s.d, s.dv, option, threads};
          if (dtype == DType::float64)
            check_attention<double>(a);
          else
            check_attention<float>(a);
        }
  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16})
    for (bool masked : {false, true})
      for (int64_t sb : {0, 1, 63, 130}) {
        if (dtype == DType::float64)
          check_bi_attention<double>(dtype, sb, 19, 6, masked, 2);
        else
          check_bi_attention<float>(dtype, sb, 19, 6, masked, 2);
      }
  Attention bad;
  int64_t beyond = 3;
  bad.dtype = DType::float32, bad.sequences = bad.heads = bad.batch_q = bad.batch_k = bad.sq = bad.sk = 1;
  bad.lengths_k = &beyond;
  const Attention* calls[] = {&bad};
  expect_close("length beyond the keys", attention_fwd(calls, 1, 1), 1, 0);
}

}  // namespace
