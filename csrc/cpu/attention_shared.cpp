// Bidirectional attention from one score matrix, forward: three products instead of four. The rows of b see all of a at
// once; the columns keep a running maximum, sum and weighted sum of values over the blocks of b (Dao et al. 2022, alg.
// 1).
#include "attention_shared.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class T>
class Forward {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes, ld = bi_block;
  static constexpr T minus_infinity = BiUnit<T>::minus_infinity;
  const BiAttention& c;
  int64_t parts, wide_a, wide_b;

 public:
  // Running sums of one part over its b positions.
  struct Sums {
    T *values, *top, *sum;  // [sa, wide_b], [sa], [sa]
  };
  struct Buffers {
    int64_t *at_a, *at_b;
    T *keys, *values_a, *queries, *values_b, *p, *e, *factor, *out, *rows;
  };

  explicit Forward(const BiAttention& call)
      : c(call), parts(bi_parts(call.sb)), wide_a(Panels<T>::padded(call.dv_a)), wide_b(Panels<T>::padded(call.dv_b)) {}

  int64_t units() const { return c.batch * c.heads; }
  int64_t pieces() const { return units() * parts; }

  int64_t thread_space() const {
    return Scratch::space(c.sa, 8) + Scratch::space(c.sb, 8) + Scratch::space(c.sa * c.d, sizeof(T)) +
           Scratch::space(c.sa * wide_a, sizeof(T)) + Scratch::space(c.d * ld, sizeof(T)) +
           Scratch::space(ld * wide_b, sizeof(T)) + 3 * Scratch::space(c.sa * ld, sizeof(T)) +
           Scratch::space(ld * wide_a, sizeof(T)) + Scratch::space(lanes * row_width(), sizeof(T));
  }
  Buffers take(Scratch& scratch) const {
    Buffers own;
    own.at_a = scratch.take<int64_t>(c.sa);
    own.at_b = scratch.take<int64_t>(c.sb);
    own.keys = scratch.take<T>(c.sa * c.d);
    own.values_a = scratch.take<T>(c.sa * wide_a);
    own.queries = scratch.take<T>(c.d * ld);
    own.values_b = scratch.take<T>(ld * wide_b);
    for (T** part : {&own.p, &own.e, &own.factor}) *part = scratch.take<T>(c.sa * ld);
    own.out = scratch.take<T>(ld * wide_a);
    own.rows = scratch.take<T>(lanes * row_width());
    return own;
  }
  int64_t sums_space() const { return Scratch::space(c.sa * wide_b, sizeof(T)) + 2 * Scratch::space(c.sa, sizeof(T)); }
  Sums take_sums(Scratch& scratch) const {
    T* values = scratch.take<T>(c.sa * wide_b);
    T* top = scratch.take<T>(c.sa);
    return {values, top, scratch.take<T>(c.sa)};
  }

  void piece(int64_t index, Buffers& own, const Sums& sums) const {
    BiUnit<T> u(c, index / parts, own.at_a, own.at_b);
    int64_t part = index % parts;
    std::fill_n(sums.top, u.na, minus_infinity);
    std::fill_n(sums.sum, u.na, T(0));
    std::fill_n(sums.values, u.na * wide_b, T(0));
    if (part == 0)
      BiUnit<T>::others(u.at_b, u.nb, c.sb, [&](int64_t i) {
        zero_bytes(u.row(c.out_b, c.sb, c.dv_a, i), c.dv_a * bytes_of(c.dtype));
        write_stats(u, c.lse_b, c.stats_b, c.sb, i, minus_infinity, T(0));
      });
    if (part >= bi_parts(u.nb)) return;
    Rows key = u.rows(c.key_a), value_a = u.rows(c.value_a), value_b = u.rows(c.value_b), query = u.rows(c.query_b);
    copy_rows([&](int64_t k) { return key[u.at_a[k]]; }, c.dtype, u.na, c.d, own.keys);
    Panels<T>::pack_rows([&](int64_t k) { return value_a[u.at_a[k]]; }, c.dtype, u.na, c.dv_a, own.values_a, own.rows);
    Ahead nothing;
    for (int64_t b0 = u.first(part), end = u.first(part + 1); b0 < end; b0 += ld) {
      int64_t count = std::min(ld, end - b0);
      Panels<T>::pack_columns([&](int64_t i) { return query[u.at_b[b0 + i]]; }, c.dtype, count, c.d, own.queries,
                              own.rows);
      Panels<T>::multiply(u.na, round_up(count, lanes), c.d, own.keys, c.d, Fixed<1>{}, own.queries, c.d, own.p, ld,
                          false, true, nothing);
      Panels<T>::pack_rows([&](int64_t i) { return value_b[u.at_b[b0 + i]]; }, c.dtype, count, c.dv_b, own.values_b,
                           own.rows);
      columns(u, own, sums, count);
      const T* weights = own.e;
      if (c.dropout_a > 0) {
        u.factors_a(own.factor, ld, b0, count);
        multiply_each(own.e, ld, own.factor, ld, own.e, ld, count, u.na);
      }
      Panels<T>::multiply(u.na, c.dv_b, count, weights, ld, Fixed<1>{}, own.values_b, count, sums.values, wide_b, true,
                          true, nothing);
      rows(u, own.p, b0, count);
      if (c.dropout_b > 0) {
        u.factors_b(own.factor, ld, b0, count);
        multiply_each(own.p, ld, own.factor, ld, own.p, ld, count, u.na);
      }
      Panels<T>::multiply(count, c.dv_a, u.na, own.p, Fixed<1>{}, ld, own.values_a, u.na, own.out, wide_a, false, true,
                          nothing);
      for (int64_t i = 0; i < count; ++i)
        narrow_row(own.out + i * wide_a, T(1), c.dv_a, c.dtype, u.row(c.out_b, c.sb, c.dv_a, u.at_b[b0 + i]));
    }
  }

  // Adds the parts of one unit.
  void finish(int64_t unit, const Sums* sums, Buffers& own) const {
    BiUnit<T> u(c, unit, own.at_a, own.at_b);
    BiUnit<T>::others(u.at_a, u.na, c.sa, [&](int64_t i) {
      zero_bytes(u.row(c.out_a, c.sa, c.dv_b, i), c.dv_b * bytes_of(c.dtype));
      write_stats(u, c.lse_a, c.stats_a, c.sa, i, minus_infinity, T(0));
    });
    for (int64_t k = 0; k < u.na; ++k) {
      T top = minus_infinity, total = 0;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, sums[part].top[k]);
      T* line = own.rows;
      std::fill_n(line, c.dv_b, T(0));
      for (int64_t part = 0; part < parts; ++part) {
        T weight = sums[part].sum[k] == 0 ? T(0) : std::exp(sums[part].top[k] - top);
        if (weight == 0) continue;
        total += weight * sums[part].sum[k];
        const T* from = sums[part].values + k * wide_b;
        for (int64_t e = 0; e < c.dv_b; ++e) line[e] += weight * from[e];
      }
      T share = total == 0 ? T(0) : 1 / total;
      narrow_row(line, share, c.dv_b, c.dtype, u.row(c.out_a, c.sa, c.dv_b, u.at_a[k]));
      write_stats(u, c.lse_a, c.stats_a, c.sa, u.at_a[k], top, share);
    }
  }

 private:
  int64_t row_width() const { return round_up(std::max({c.d, c.dv_a, c.dv_b, int64_t(1)}), lanes); }

  void write_stats(const BiUnit<T>& u, void* lse, void* stats, int64_t s, int64_t position, T top, T share) const {
    if (lse) u.of(lse, s, position) = share == 0 ? minus_infinity : top - std::log(share);
    if (stats) {
      u.of_stats(stats, 0, s, position) = share == 0 ? T(0) : top;
      u.of_stats(stats, 1, s, position) = share;
    }
  }

  // e = exp(scale s - top) of each column a, whose running sums move to the new maximum.
  void columns(const BiUnit<T>& u, Buffers& own, const Sums& sums, int64_t count) const {
    T scale = T(c.scale);
    int64_t whole = round_up(count, lanes);
    for (int64_t k = 0; k < u.na; ++k) {
      const T* s = own.p + k * ld;
      T* e = own.e + k * ld;
      for (int64_t i = 0; i < whole; i += lanes) store(e + i, V(load(s + i) * scale));
      for (int64_t i = count; i < whole; ++i) e[i] = minus_infinity;
      V most = broadcast(minus_infinity);
      for (int64_t i = 0; i < whole; i += lanes) most = larger(load(e + i), most);
      T top = std::max(max_lanes<T>(most), sums.top[k]);
      if (top > sums.top[k]) {
        T factor = sums.sum[k] == 0 ? T(0) : std::exp(sums.top[k] - top);
        T* values = sums.values + k * wide_b;
        for (int64_t at = 0; at < wide_b; at += lanes) store(values + at, V(load(values + at) * factor));
        sums.sum[k] *= factor;
        sums.top[k] = top;
      }
      V base = broadcast(top == minus_infinity ? T(0) : top), sum{};
      for (int64_t i = 0; i < whole; i += lanes) {
        V value = exp_of_difference<T>(load(e + i) - base);
        store(e + i, value);
        sum += value;
      }
      sums.sum[k] += sum_lanes<T>(sum);
    }
  }

  // Scores become the probabilities of b over a, in place.
  void rows(const BiUnit<T>& u, T* p, int64_t b0, int64_t count) const {
    T scale = T(c.scale);
    for (int64_t i = 0; i < count; i += lanes) {
      V top = broadcast(minus_infinity), sum{};
      for (int64_t k = 0; k < u.na; ++k) {
        V x = load(p + k * ld + i) * scale;
        store(p + k * ld + i, x);
        top = larger(x, top);
      }
      for (int64_t k = 0; k < u.na; ++k) {
        V e = exp_of_difference<T>(load(p + k * ld + i) - top);
        store(p + k * ld + i, e);
        sum += e;
      }
      V share = sum == T(0) ? V{} : T(1) / sum;
      for (int64_t k = 0; k < u.na; ++k) store(p + k * ld + i, V(load(p + k * ld + i) * share));
      for (int64_t l = 0; l < std::min(lanes, count - i); ++l)
        write_stats(u, c.lse_b, c.stats_b, c.sb, u.at_b[b0 + i + l], top[l], share[l]);
    }
  }
};

template <class T>
void forward(const BiAttention& c, int threads) {
  Forward<T> kernel(c);
  int64_t pieces = kernel.pieces(), units = kernel.units(), parts = units ? pieces / units : 1;
  double work = double(units) * double(c.sa) * double(c.sb) * double(c.d + c.dv_a + c.dv_b + 8);
  threads = threads_for(work, pieces, threads);
  Scratch scratch(threads * kernel.thread_space() + pieces * kernel.sums_space());
  std::vector<typename Forward<T>::Buffers> own;
  std::vector<typename Forward<T>::Sums> sums;
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

int bi_attention_fwd(const BiAttention& call, int threads) {
  if (call.dtype == DType::float64)
    forward<double>(call, threads);
  else
    forward<float>(call, threads);
  return 0;
}

}  // namespace vlmfast::VLMFAST_ISA
