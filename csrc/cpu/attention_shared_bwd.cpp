// Gradients of bidirectional attention, seven products instead of ten. With P_b = softmax over a, P_a = softmax over b,
// both from one S:
//   dS = P_b (dO_b V_a^T - rowsum(dO_b O_b)) + P_a (dO_a V_b^T - rowsum(dO_a O_a)), each with its log-sum-exp's
//   gradient, dQ_b = s dS K_a,  dK_a = s dS^T Q_b,  dV_a = P_b^T dO_b,  dV_b = P_a^T dO_a.
#include "attention_shared.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class T>
class Backward {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes, ld = bi_block;
  const BiAttention& c;
  int64_t parts, wide, wide_a, wide_b;

 public:
  struct Sums {
    T *keys, *values;  // [sa, wide], [sa, wide_a]
  };
  struct Buffers {
    int64_t *at_a, *at_b;
    T *keys, *key_panels, *values_a, *d_out_a, *d_out_a_panels;                // of all a
    T *queries, *query_panels, *values_b, *d_out_b, *d_out_b_panels, *d_rows;  // of a block of b
    T *p_a, *p_b, *x, *y, *factor_a, *factor_b, *inner, *rows;
  };

  explicit Backward(const BiAttention& call)
      : c(call),
        parts(bi_parts(call.sb)),
        wide(Panels<T>::padded(call.d)),
        wide_a(Panels<T>::padded(call.dv_a)),
        wide_b(Panels<T>::padded(call.dv_b)) {}

  int64_t units() const { return c.batch * c.heads; }
  int64_t pieces() const { return units() * parts; }

  int64_t thread_space() const {
    auto numbers = [](int64_t count) { return Scratch::space(count, sizeof(T)); };
    return Scratch::space(c.sa, 8) + Scratch::space(c.sb, 8) + numbers(c.sa * c.d) + numbers(c.sa * wide) +
           numbers(c.sa * c.dv_a) + numbers(c.sa * c.dv_b) + numbers(c.sa * wide_b) + numbers(c.d * ld) +
           numbers(ld * wide) + numbers(c.dv_b * ld) + numbers(c.dv_a * ld) + numbers(ld * wide_a) +
           numbers(ld * std::max(wide, wide_b)) + 6 * numbers(c.sa * ld) + numbers(c.sa) + numbers(lanes * row_width());
  }
  Buffers take(Scratch& scratch) const {
    Buffers own;
    own.at_a = scratch.take<int64_t>(c.sa);
    own.at_b = scratch.take<int64_t>(c.sb);
    own.keys = scratch.take<T>(c.sa * c.d);
    own.key_panels = scratch.take<T>(c.sa * wide);
    own.values_a = scratch.take<T>(c.sa * c.dv_a);
    own.d_out_a = scratch.take<T>(c.sa * c.dv_b);
    own.d_out_a_panels = scratch.take<T>(c.sa * wide_b);
    own.queries = scratch.take<T>(c.d * ld);
    own.query_panels = scratch.take<T>(ld * wide);
    own.values_b = scratch.take<T>(c.dv_b * ld);
    own.d_out_b = scratch.take<T>(c.dv_a * ld);
    own.d_out_b_panels = scratch.take<T>(ld * wide_a);
    own.d_rows = scratch.take<T>(ld * std::max(wide, wide_b));
    for (T** part : {&own.p_a, &own.p_b, &own.x, &own.y, &own.factor_a, &own.factor_b})
      *part = scratch.take<T>(c.sa * ld);
    own.inner = scratch.take<T>(c.sa);
    own.rows = scratch.take<T>(lanes * row_width());
    return own;
  }
  int64_t sums_space() const {
    return Scratch::space(c.sa * wide, sizeof(T)) + Scratch::space(c.sa * wide_a, sizeof(T));
  }
  Sums take_sums(Scratch& scratch) const {
    T* keys = scratch.take<T>(c.sa * wide);
    return {keys, scratch.take<T>(c.sa * wide_a)};
  }

  void piece(int64_t index, Buffers& own, const Sums& sums) const {
    BiUnit<T> u(c, index / parts, own.at_a, own.at_b);
    int64_t part = index % parts;
    std::fill_n(sums.keys, u.na * wide, T(0));
    std::fill_n(sums.values, u.na * wide_a, T(0));
    if (part == 0)
      BiUnit<T>::others(u.at_b, u.nb, c.sb, [&](int64_t i) {
        zero_bytes(u.row(c.d_query_b, c.sb, c.d, i), c.d * bytes_of(c.dtype));
        zero_bytes(u.row(c.d_value_b, c.sb, c.dv_b, i), c.dv_b * bytes_of(c.dtype));
      });
    if (part >= bi_parts(u.nb)) return;
    Rows key = u.rows(c.key_a), value_a = u.rows(c.value_a), value_b = u.rows(c.value_b), query = u.rows(c.query_b);
    Rows d_out_a = u.rows(c.d_out_a), d_out_b = u.rows(c.d_out_b);
    auto from_a = [&](const Rows& rows) { return [&](int64_t k) { return rows[u.at_a[k]]; }; };
    copy_rows(from_a(key), c.dtype, u.na, c.d, own.keys);
    Panels<T>::pack_rows(from_a(key), c.dtype, u.na, c.d, own.key_panels, own.rows);
    copy_rows(from_a(value_a), c.dtype, u.na, c.dv_a, own.values_a);
    copy_rows(from_a(d_out_a), c.dtype, u.na, c.dv_b, own.d_out_a);
    Panels<T>::pack_rows(from_a(d_out_a), c.dtype, u.na, c.dv_b, own.d_out_a_panels, own.rows);
    for (int64_t k = 0; k < u.na; ++k) {
      widen_row(u.row(c.out_a, c.sa, c.dv_b, u.at_a[k]), c.dtype, c.dv_b, own.rows);
      double inner = 0;
      for (int64_t e = 0; e < c.dv_b; ++e) inner += double(own.rows[e]) * double(own.d_out_a[k * c.dv_b + e]);
      own.inner[k] = T(inner) - (c.d_lse_a ? u.of(const_cast<void*>(c.d_lse_a), c.sa, u.at_a[k]) : T(0));
    }
    Ahead nothing;
    for (int64_t b0 = u.first(part), end = u.first(part + 1); b0 < end; b0 += ld) {
      int64_t count = std::min(ld, end - b0), whole = round_up(count, lanes);
      auto from_b = [&](const Rows& rows) { return [&](int64_t i) { return rows[u.at_b[b0 + i]]; }; };
      Panels<T>::pack_columns(from_b(query), c.dtype, count, c.d, own.queries, own.rows);
      Panels<T>::multiply(u.na, whole, c.d, own.keys, c.d, Fixed<1>{}, own.queries, c.d, own.p_b, ld, false, true,
                          nothing);
      probabilities(u, own, b0, count);
      // P_a or P_b with its dropout, where it weighs values
      const T *weights_a = own.p_a, *weights_b = own.p_b;
      if (c.dropout_a > 0) {
        u.factors_a(own.factor_a, ld, b0, count);
        multiply_each(own.p_a, ld, own.factor_a, ld, own.x, ld, count, u.na);
        weights_a = own.x;
      }
      Panels<T>::multiply(count, c.dv_b, u.na, weights_a, Fixed<1>{}, ld, own.d_out_a_panels, u.na, own.d_rows, wide_b,
                          false, true, nothing);
      for (int64_t i = 0; i < count; ++i)
        narrow_row(own.d_rows + i * wide_b, T(1), c.dv_b, c.dtype, u.row(c.d_value_b, c.sb, c.dv_b, u.at_b[b0 + i]));
      if (c.dropout_b > 0) {
        u.factors_b(own.factor_b, ld, b0, count);
        multiply_each(own.p_b, ld, own.factor_b, ld, own.x, ld, count, u.na);
        weights_b = own.x;
      }
      Panels<T>::pack_rows(from_b(d_out_b), c.dtype, count, c.dv_a, own.d_out_b_panels, own.rows);
      Panels<T>::multiply(u.na, c.dv_a, count, weights_b, ld, Fixed<1>{}, own.d_out_b_panels, count, sums.values,
                          wide_a, true, true, nothing);
      Panels<T>::pack_columns(from_b(d_out_b), c.dtype, count, c.dv_a, own.d_out_b, own.rows);
      Panels<T>::multiply(u.na, whole, c.dv_a, own.values_a, c.dv_a, Fixed<1>{}, own.d_out_b, c.dv_a, own.x, ld, false,
                          true, nothing);
      Panels<T>::pack_columns(from_b(value_b), c.dtype, count, c.dv_b, own.values_b, own.rows);
      Panels<T>::multiply(u.na, whole, c.dv_b, own.d_out_a, c.dv_b, Fixed<1>{}, own.values_b, c.dv_b, own.y, ld, false,
                          true, nothing);
      if (c.dropout_b > 0) multiply_each(own.x, ld, own.factor_b, ld, own.x, ld, count, u.na);
      if (c.dropout_a > 0) multiply_each(own.y, ld, own.factor_a, ld, own.y, ld, count, u.na);
      score_gradients(u, own, b0, count);
      Panels<T>::multiply(count, c.d, u.na, own.x, Fixed<1>{}, ld, own.key_panels, u.na, own.d_rows, wide, false, true,
                          nothing);
      for (int64_t i = 0; i < count; ++i)
        narrow_row(own.d_rows + i * wide, T(c.scale), c.d, c.dtype, u.row(c.d_query_b, c.sb, c.d, u.at_b[b0 + i]));
      Panels<T>::pack_rows(from_b(query), c.dtype, count, c.d, own.query_panels, own.rows);
      Panels<T>::multiply(u.na, c.d, count, own.x, ld, Fixed<1>{}, own.query_panels, count, sums.keys, wide, true, true,
                          nothing);
    }
  }

  void finish(int64_t unit, const Sums* sums, Buffers& own) const {
    BiUnit<T> u(c, unit, own.at_a, own.at_b);
    BiUnit<T>::others(u.at_a, u.na, c.sa, [&](int64_t i) {
      zero_bytes(u.row(c.d_key_a, c.sa, c.d, i), c.d * bytes_of(c.dtype));
      zero_bytes(u.row(c.d_value_a, c.sa, c.dv_a, i), c.dv_a * bytes_of(c.dtype));
    });
    auto add = [&](T* Sums::* which, int64_t stride, int64_t width, T factor, void* to) {
      for (int64_t k = 0; k < u.na; ++k) {
        std::fill_n(own.rows, width, T(0));
        for (int64_t part = 0; part < parts; ++part)
          for (int64_t e = 0; e < width; ++e) own.rows[e] += (sums[part].*which)[k * stride + e];
        narrow_row(own.rows, factor, width, c.dtype, u.row(to, c.sa, width, u.at_a[k]));
      }
    };
    add(&Sums::keys, wide, c.d, T(c.scale), c.d_key_a);
    add(&Sums::values, wide_a, c.dv_a, T(1), c.d_value_a);
  }

 private:
  int64_t row_width() const { return round_up(std::max({c.d, c.dv_a, c.dv_b, int64_t(1)}), lanes); }

  // Dot products in p_b become both softmaxes' probabilities, from the forward's maxima and sums.
  void probabilities(const BiUnit<T>& u, Buffers& own, int64_t b0, int64_t count) const {
    T scale = T(c.scale);
    for (int64_t i = 0; i < count; i += lanes) {
      V top{}, share{};
      for (int64_t l = 0; l < std::min(lanes, count - i); ++l) {
        top[l] = u.of_stats(c.stats_b, 0, c.sb, u.at_b[b0 + i + l]);
        share[l] = u.of_stats(c.stats_b, 1, c.sb, u.at_b[b0 + i + l]);
      }
      for (int64_t k = 0; k < u.na; ++k) {
        V x = load(own.p_b + k * ld + i) * scale;
        T top_a = u.of_stats(c.stats_a, 0, c.sa, u.at_a[k]), share_a = u.of_stats(c.stats_a, 1, c.sa, u.at_a[k]);
        store(own.p_a + k * ld + i, V(exp_of_difference<T>(x - top_a) * share_a));
        store(own.p_b + k * ld + i, V(exp_of_difference<T>(x - top) * share));
      }
    }
  }

  // x = V_a dO_b^T and y = dO_a V_b^T become x = dS^T.
  void score_gradients(const BiUnit<T>& u, Buffers& own, int64_t b0, int64_t count) const {
    for (int64_t i = 0; i < count; i += lanes) {
      V inner{};
      for (int64_t k = 0; k < u.na; ++k) inner += load(own.p_b + k * ld + i) * load(own.x + k * ld + i);
      if (c.d_lse_b)
        for (int64_t l = 0; l < std::min(lanes, count - i); ++l)
          inner[l] -= u.of(const_cast<void*>(c.d_lse_b), c.sb, u.at_b[b0 + i + l]);
      for (int64_t k = 0; k < u.na; ++k) {
        V from_b = load(own.p_b + k * ld + i) * (load(own.x + k * ld + i) - inner);
        V from_a = load(own.p_a + k * ld + i) * (load(own.y + k * ld + i) - own.inner[k]);
        store(own.x + k * ld + i, V(from_b + from_a));
      }
    }
  }
};

template <class T>
void backward(const BiAttention& c, int threads) {
  Backward<T> kernel(c);
  int64_t pieces = kernel.pieces(), units = kernel.units(), parts = units ? pieces / units : 1;
  double work = 3 * double(units) * double(c.sa) * double(c.sb) * double(c.d + c.dv_a + c.dv_b + 8);
  threads = threads_for(work, pieces, threads);
  Scratch scratch(threads * kernel.thread_space() + pieces * kernel.sums_space());
  std::vector<typename Backward<T>::Buffers> own;
  std::vector<typename Backward<T>::Sums> sums;
  for (int t = 0; t < threads; ++t) own.push_back(kernel.take(scratch));
  for (int64_t i = 0; i < pieces; ++i) sums.push_back(kernel.take_sums(scratch));
  Queue first(pieces, 1), second(units, 1);
  parallel(threads, [&](const Team& team) {
    auto& mine = own[size_t(team.rank)];
    first.work([&](int64_t at) { kernel.piece(at, mine, sums[size_t(at)]); });
    team.barrier();
    second.work([&](int64_t at) { kernel.finish(at, &sums[size_t(at * parts)], mine); });
  });
}

}  // namespace

int bi_attention_bwd(const BiAttention& call, int threads) {
  if (call.dtype == DType::float64)
    backward<double>(call, threads);
  else
    backward<float>(call, threads);
  return 0;
}

}  // namespace vlmfast::VLMFAST_ISA
