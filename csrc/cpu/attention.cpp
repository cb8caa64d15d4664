// Scaled dot-product attention (Vaswani et al. 2017, eq. 1) between two streams, forward. One unit is one head of one
// sequence: K is copied row by row, Q is transposed into panels and V packed once, and a block of queries then is
// P^T = softmax(K Q^T) and O = P V, both on operands that stay in the second-level cache.
#include "attention_unit.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class T>
struct Buffers {
  int64_t* positions;
  T *keys, *values, *queries, *scores, *dropped, *out, *rows, *lse;
  Apart<T> apart;

  static int64_t space(const Room& r) {
    return Scratch::space(r.keys, 8) + Scratch::space(r.keys * r.width_q, sizeof(T)) +
           Scratch::space(r.keys * r.width_v, sizeof(T)) + Scratch::space(r.block * r.width_q, sizeof(T)) +
           2 * Scratch::space(r.scores, sizeof(T)) + Scratch::space(r.block * r.width_v, sizeof(T)) +
           Scratch::space(r.template rows<T>(), sizeof(T)) + Scratch::space(r.block, sizeof(T));
  }
  Buffers(Scratch& scratch, const Room& r)
      : positions(scratch.take<int64_t>(r.keys)),
        keys(scratch.take<T>(r.keys * r.width_q)),
        values(scratch.take<T>(r.keys * r.width_v)),
        queries(scratch.take<T>(r.block * r.width_q)),
        scores(scratch.take<T>(r.scores)),
        dropped(scratch.take<T>(r.scores)),
        out(scratch.take<T>(r.block * r.width_v)),
        rows(scratch.take<T>(r.template rows<T>())),
        lse(scratch.take<T>(r.block)) {}
};

template <class T>
class Forward {
  static constexpr int64_t lanes = Simd<T>::lanes;
  static constexpr T minus_infinity = Unit<T>::minus_infinity;
  const Attention& c;
  const T* bias;

 public:
  explicit Forward(const Attention& call, const T* shared_bias = nullptr) : c(call), bias(shared_bias) {}

  void unit(int64_t index, Buffers<T>& own) const {
    Unit<T> u(c, index / c.heads, index % c.heads, own.positions, bias);
    const T* key_rows = own.keys;
    int64_t key_stride = c.d;
    if (u.keys_in_place())
      key_rows = reinterpret_cast<const T*>(u.key.at), key_stride = c.key.row;
    else
      copy_rows([&](int64_t k) { return u.key_row(k); }, c.dtype, u.nk, c.d, own.keys);
    Panels<T>::pack_rows([&](int64_t k) { return u.value_row(k); }, c.dtype, u.nk, c.dv, own.values, own.rows);
    bool apart = u.masked_by_query();
    if (apart) own.apart.find(own.values, u.nk, c.dv);
    Ahead ahead;
    if (index + 1 < c.sequences * c.heads) {
      Unit<T> next(c, (index + 1) / c.heads, (index + 1) % c.heads, nullptr);
      next.announce(ahead);
      if (memory_bound(c) && !c.rows_q) {
        int64_t size = bytes_of(c.dtype);
        ahead.add(out_row(next, 0), c.heads * c.dv * size, next.nq, c.dv * size, true);
      }
      ahead.spread(Panels<T>::tiles(u.nk, u.nq) + Panels<T>::tiles(u.nq, c.dv));
    }
    int64_t size = block_queries<T>(u.nq, u.nk);
    for (int64_t i0 = 0; i0 < u.nq; i0 += size) {
      int64_t queries = std::min(size, u.nq - i0), keys = u.limit(i0 + queries), ld = round_up(queries, lanes);
      T* p = own.scores;
      int64_t p_ld = ld;
      if (c.kept) {
        p_ld = round_up(c.sq, 16);
        p = static_cast<T*>(c.kept) + index * c.sk * p_ld + i0;
      }
      Panels<T>::pack_columns([&](int64_t i) { return u.query[i0 + i]; }, c.dtype, queries, c.d, own.queries, own.rows);
      Panels<T>::multiply(keys, ld, c.d, key_rows, key_stride, Fixed<1>{}, own.queries, c.d, p, p_ld, false, true,
                          ahead);
      u.softmax(p, p_ld, i0, queries, keys, c.lse ? own.lse : nullptr);
      const T* weights = p;
      int64_t weights_ld = p_ld;
      if (c.dropout > 0) {
        u.dropout_factors(own.dropped, ld, i0, queries, keys);
        multiply_each(p, p_ld, own.dropped, ld, own.dropped, ld, queries, keys);
        weights = own.dropped, weights_ld = ld;
      }
      average(u, own, weights, weights_ld, i0, queries, keys, apart, ahead);
      if (c.lse)
        for (int64_t i = 0; i < queries; ++i) *lse_at(u, i0 + i) = own.lse[i];
      if (c.probs) {
        bool dropped = c.probs_dropout;
        write_probs(u, dropped ? weights : p, dropped ? weights_ld : p_ld, i0, queries, keys, own.rows);
      }
    }
    pad(u);
  }

  // Rows of packed streams behind the last sequence belong to nobody.
  void slack() const {
    if (!c.cu_q) return;
    int64_t first = c.cu_q[c.sequences], size = c.heads * c.dv * bytes_of(c.dtype);
    zero_bytes(static_cast<char*>(c.out) + first * size, (c.batch_q - first) * size);
    if (c.lse) std::fill_n(static_cast<T*>(c.lse) + first * c.heads, (c.batch_q - first) * c.heads, minus_infinity);
  }

 private:
  char* out_row(const Unit<T>& u, int64_t i) const {
    int64_t row = c.cu_q          ? u.first_q + i
                  : u.query.index ? u.sample_q * c.length_q + u.query.index[i]
                                  : u.sequence * c.sq + i;
    return static_cast<char*>(c.out) + (row * c.heads + u.head) * c.dv * bytes_of(c.dtype);
  }
  T* lse_at(const Unit<T>& u, int64_t i) const {
    return static_cast<T*>(c.lse) +
           (c.cu_q ? (u.first_q + i) * c.heads + u.head : (u.sequence * c.heads + u.head) * c.sq + i);
  }
  char* probs_row(const Unit<T>& u, int64_t i) const {
    return static_cast<char*>(c.probs) + ((u.sequence * c.heads + u.head) * c.sq + i) * c.sk * bytes_of(c.dtype);
  }

  // O = P V
  void average(const Unit<T>& u, Buffers<T>& own, const T* weights, int64_t ld, int64_t i0, int64_t queries,
               int64_t keys, bool apart, Ahead& ahead) const {
    bool in_place = c.dtype == Plain<T>::stored && !u.query.index;
    T* out = in_place ? reinterpret_cast<T*>(out_row(u, i0)) : own.out;
    int64_t row = in_place ? c.heads * c.dv : Panels<T>::padded(c.dv);
    Panels<T>::multiply(queries, c.dv, keys, weights, Fixed<1>{}, ld, own.values, u.nk, out, row, false, !in_place,
                        ahead);
    if (apart) own.apart.add(queries, weights, 1, ld, keys, out, row);
    if (!in_place)
      for (int64_t i = 0; i < queries; ++i) narrow_row(out + i * row, T(1), c.dv, c.dtype, out_row(u, i0 + i));
  }

  void write_probs(const Unit<T>& u, const T* p, int64_t ld, int64_t i0, int64_t queries, int64_t keys, T* rows) const {
    int64_t stride = round_up(keys, lanes), size = bytes_of(c.dtype);
    for (int64_t i = 0; i < queries; i += lanes) {
      rows_from_columns(p + i, ld, keys, rows, stride);
      for (int64_t r = 0; r < std::min(lanes, queries - i); ++r) {
        char* to = probs_row(u, i0 + i + r);
        const T* from = rows + r * stride;
        if (!u.live) {
          narrow_row(from, T(1), keys, c.dtype, to);
          zero_bytes(to + keys * size, (c.sk - keys) * size);
        } else {
          zero_bytes(to, c.sk * size);
          for (int64_t k = 0; k < keys; ++k) narrow_row(from + k, T(1), 1, c.dtype, to + u.live[k] * size);
        }
      }
    }
  }

  // Padded queries.
  void pad(const Unit<T>& u) const {
    if (c.cu_q) return;
    for (int64_t i = u.nq; i < c.sq; ++i) {
      zero_bytes(out_row(u, i), c.dv * bytes_of(c.dtype));
      if (c.lse) *lse_at(u, i) = minus_infinity;
    }
    if (c.probs && u.nq < c.sq) zero_bytes(probs_row(u, u.nq), (c.sq - u.nq) * c.sk * bytes_of(c.dtype));
  }
};

template <class T>
void forward(const Attention* const* calls, int count, int threads) {
  Room room;
  int64_t units = 0;
  double work = 0;
  for (int i = 0; i < count; ++i) {
    const Attention& c = *calls[i];
    room.cover<T>(c);
    Forward<T>(c).slack();
    units += c.sequences * c.heads;
    work += double(c.sequences * c.heads) * double(room.queries) * double(room.keys) * double(c.d + c.dv + 8);
  }
  threads = threads_for(work, units, threads);
  int64_t bias_space = 0;
  for (int i = 0; i < count; ++i) bias_space += Scratch::space(shared_bias_count<T>(*calls[i]), sizeof(T));
  Scratch scratch(threads * Buffers<T>::space(room) + bias_space);
  std::vector<Forward<T>> directions;
  for (int i = 0; i < count; ++i) {
    int64_t numbers = shared_bias_count<T>(*calls[i]);
    T* bias = numbers ? scratch.take<T>(numbers) : nullptr;
    if (bias) transpose_bias(*calls[i], bias);
    directions.emplace_back(*calls[i], bias);
  }
  std::vector<Buffers<T>> own;
  for (int t = 0; t < threads; ++t) own.emplace_back(scratch, room);
  // neighbouring heads share pages and cache lines
  int64_t heads = calls[0]->heads;
  Queue queue(units, units >= 8 * threads * heads ? heads : 1);
  parallel(threads, [&](const Team& team) {
    queue.work([&](int64_t at) {
      int which = 0;
      for (; at >= calls[which]->sequences * calls[which]->heads; ++which)
        at -= calls[which]->sequences * calls[which]->heads;
      directions[size_t(which)].unit(at, own[size_t(team.rank)]);
    });
  });
}

}  // namespace

int attention_fwd(const Attention* const* calls, int count, int threads) {
  for (int i = 0; i < count; ++i)
    if (!within_bounds(*calls[i])) return 1;
  if (calls[0]->dtype == DType::float64)
    forward<double>(calls, count, threads);
  else
    forward<float>(calls, count, threads);
  return 0;
}

}  // namespace vlmfast::VLMFAST_ISA
