// Gradients of scaled dot-product attention. With P kept or computed again exactly as the forward did:
//   dV = P~^T dO,  dP = (V dO^T)^T keep / (1 - rate) + dProbs,  dS = P (dP - rowsum(P dP) + dLse),
//   dQ = scale dS K,  dK = scale dS^T Q,  dBias = dS summed over what the bias was broadcast along.
// All of them are products of P^T or dS^T, [keys][queries], as it stands.
#include "attention_unit.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class T>
struct Buffers {
  int64_t* positions;
  T *keys, *values, *key_panels, *d_keys, *d_values;
  T *query_columns, *query_panels, *d_out_columns, *d_out_panels, *d_queries;
  T *p, *x, *factor, *rows, *lse;
  double* bias;
  Apart<T> apart_keys, apart_queries, apart_d_out;

  static int64_t space(const Room& r, int64_t bias) {
    int64_t by_keys =
        3 * Scratch::space(r.keys * r.width_q, sizeof(T)) + 2 * Scratch::space(r.keys * r.width_v, sizeof(T));
    int64_t by_block =
        3 * Scratch::space(r.block * r.width_q, sizeof(T)) + 2 * Scratch::space(r.block * r.width_v, sizeof(T));
    return Scratch::space(r.keys, 8) + by_keys + by_block + 3 * Scratch::space(r.scores, sizeof(T)) +
           Scratch::space(r.template rows<T>(), sizeof(T)) + Scratch::space(r.block, sizeof(T)) +
           Scratch::space(bias, 8);
  }
  Buffers(Scratch& scratch, const Room& r, int64_t bias_count) {
    positions = scratch.take<int64_t>(r.keys);
    for (T** part : {&keys, &key_panels, &d_keys}) *part = scratch.take<T>(r.keys * r.width_q);
    for (T** part : {&values, &d_values}) *part = scratch.take<T>(r.keys * r.width_v);
    for (T** part : {&query_columns, &query_panels, &d_queries}) *part = scratch.take<T>(r.block * r.width_q);
    for (T** part : {&d_out_columns, &d_out_panels}) *part = scratch.take<T>(r.block * r.width_v);
    for (T** part : {&p, &x, &factor}) *part = scratch.take<T>(r.scores);
    rows = scratch.take<T>(r.template rows<T>());
    lse = scratch.take<T>(r.block);
    bias = scratch.take<double>(bias_count);
  }
};

// How one direction is cut into pieces that share no gradient row; every number in it depends on the sizes alone, and
// so do the sums, whatever the threads.
struct Plan {
  int64_t parts;       // of the sequences
  bool by_head;        // one head a piece, or all
  bool accumulate;     // sequences share rows of the streams
  bool shared_bias;    // pieces share a slot of the bias: each keeps its own sums, which are added at the end
  int64_t slot_count;  // numbers in a slot: one sequence and head of the bias

  explicit Plan(const Attention& c) {
    bool paired = c.pair_q != nullptr, gathered = c.rows_q != nullptr && c.sq != c.sk;
    bool same_batch = c.d_bias && c.bias_shape[0] == 1 && c.sequences > 1;
    bool same_head = c.d_bias && c.bias_shape[1] == 1 && c.heads > 1;
    accumulate = paired || gathered;
    slot_count = c.d_bias ? c.bias_shape[2] * c.bias_shape[3] : 0;
    int64_t few = std::clamp<int64_t>((int64_t(32) << 20) / (8 * std::max<int64_t>(slot_count * c.heads, 1)), 1, 16);
    by_head = !same_head || (paired && same_batch);
    parts = paired       ? 1
            : gathered   ? c.sequences / std::max<int64_t>(c.groups, 1)
            : same_batch ? std::min(few, c.sequences)
                         : c.sequences;
    shared_bias = same_batch;
  }
  int64_t pieces(const Attention& c) const { return by_head ? parts * c.heads : parts; }
};

template <class T>
class Backward {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes;
  const Attention& c;
  const Plan& plan;
  double* shared;  // [pieces][slot_count]
  const T* shared_bias;

 public:
  Backward(const Attention& call, const Plan& p, double* sums, const T* bias)
      : c(call), plan(p), shared(sums), shared_bias(bias) {}

  void piece(int64_t index, Buffers<T>& own) const {
    int64_t part = plan.by_head ? index / c.heads : index;
    int64_t h0 = plan.by_head ? index % c.heads : 0, h1 = plan.by_head ? h0 + 1 : c.heads;
    int64_t s0 = c.sequences * part / plan.parts, s1 = c.sequences * (part + 1) / plan.parts;
    double* bias = plan.shared_bias ? shared + index * plan.slot_count : own.bias;
    bool one_slot = plan.shared_bias;
    if (c.d_bias && one_slot) std::fill_n(bias, plan.slot_count, 0.0);
    for (int64_t s = s0; s < s1; ++s)
      for (int64_t h = h0; h < h1; ++h) {
        bool whole_sequence = c.bias_shape[1] == 1;  // the heads of a sequence share a slot
        if (c.d_bias && !one_slot && (h == h0 || !whole_sequence)) std::fill_n(bias, plan.slot_count, 0.0);
        Ahead ahead;
        announce(index, s, h, s1, h0, h1, ahead);
        unit(Unit<T>(c, s, h, own.positions, shared_bias), own, bias, ahead);
        if (c.d_bias && !one_slot && (h + 1 == h1 || !whole_sequence))
          write_bias(bias,
                     whole_sequence ? (c.bias_shape[0] == 1 ? 0 : s) : (c.bias_shape[0] == 1 ? 0 : s) * c.heads + h);
      }
  }

  // After all pieces: the sums of each slot, piece by piece.
  void finish(double* sum) const {
    if (!c.d_bias || !plan.shared_bias) return;
    int64_t slots = c.bias_shape[1], pieces = plan.pieces(c);
    for (int64_t slot = 0; slot < slots; ++slot) {
      std::fill_n(sum, plan.slot_count, 0.0);
      for (int64_t at = slots > 1 ? slot : 0; at < pieces; at += slots > 1 ? slots : 1)
        for (int64_t e = 0; e < plan.slot_count; ++e) sum[e] += shared[at * plan.slot_count + e];
      write_bias(sum, slot);
    }
  }

  // What no piece writes: everything where pieces add to rows, and the rows behind packed sequences.
  void clear() const {
    int64_t size = bytes_of(c.gradient_dtype);
    auto zero = [&](void* at, int64_t batch, int64_t length, int64_t width, const int64_t* cu) {
      if (!at) return;
      int64_t rows = cu ? batch : batch * length, first = cu ? cu[c.sequences] : 0;
      if (!cu && !plan.accumulate) return;
      zero_bytes(static_cast<char*>(at) + first * c.heads * width * size, (rows - first) * c.heads * width * size);
    };
    zero(c.d_query, c.batch_q, c.length_q, c.d, c.cu_q);
    zero(c.d_key, c.batch_k, c.length_k, c.d, c.cu_k);
    zero(c.d_value, c.batch_k, c.length_k, c.dv, c.cu_k);
    if (c.d_bias && c.sequences * c.heads == 0)
      zero_bytes(c.d_bias, c.bias_shape[0] * c.bias_shape[1] * plan.slot_count * bytes_of(c.bias_dtype));
  }

 private:
  // Sums [Sk][Sq] -> the slot's [Sq][Sk].
  void write_bias(const double* sums, int64_t slot) const {
    int64_t rows = c.bias_shape[2], columns = c.bias_shape[3];
    char* to = static_cast<char*>(c.d_bias) + slot * plan.slot_count * bytes_of(c.bias_dtype);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        narrow_row(sums + j * rows + i, 1.0, 1, c.bias_dtype, to + (i * columns + j) * bytes_of(c.bias_dtype));
  }

  char* query_gradient(const Unit<T>& u, int64_t i) const {
    int64_t row = c.cu_q ? u.first_q + i : u.sample_q * c.length_q + (u.query.index ? u.query.index[i] : i);
    return static_cast<char*>(c.d_query) + (row * c.heads + u.head) * c.d * bytes_of(c.gradient_dtype);
  }
  char* key_gradient(const Unit<T>& u, void* start, int64_t width, int64_t position) const {
    int64_t row =
        c.cu_k ? u.first_k + position : u.sample_k * c.length_k + (u.key.index ? u.key.index[position] : position);
    return static_cast<char*>(start) + (row * c.heads + u.head) * width * bytes_of(c.gradient_dtype);
  }
  void write_row(const T* from, T factor, int64_t width, char* to) const {
    if (plan.accumulate) {
      // gradients that are added to have the working type
      T* sums = reinterpret_cast<T*>(to);
      for (int64_t e = 0; e < width; ++e) sums[e] += factor * from[e];
    } else {
      narrow_row(from, factor, width, c.gradient_dtype, to);
    }
  }
  // Rows of the live keys from `from`, 0 for the others.
  void write_keys(const Unit<T>& u, const T* from, T factor, int64_t width, void* start) const {
    if (!start) return;
    int64_t stride = Panels<T>::padded(width), length = c.cu_k ? c.cu_k[u.sequence + 1] - u.first_k : c.sk;
    for (int64_t position = 0, k = 0; position < length; ++position) {
      if (k < u.nk && u.position(k) == position)
        write_row(from + k++ * stride, factor, width, key_gradient(u, start, width, position));
      else if (!plan.accumulate)
        zero_bytes(key_gradient(u, start, width, position), width * bytes_of(c.gradient_dtype));
    }
  }

  // The unit that this thread computes after (s, h).
  void announce(int64_t index, int64_t s, int64_t h, int64_t s1, int64_t h0, int64_t h1, Ahead& ahead) const {
    if (h + 1 < h1) {
      ++h;
    } else if (s + 1 < s1) {
      ++s, h = h0;
    } else if (plan.by_head && index + 1 < plan.pieces(c)) {
      h = (index + 1) % c.heads, s = c.sequences * ((index + 1) / c.heads) / plan.parts;
    } else {
      return;
    }
    Unit<T> u(c, s, h, nullptr);
    u.announce(ahead);
    if (!u.query.index && memory_bound(c)) {
      Rows d_out = rows_of(c.d_out, c.dtype, c.cu_q ? 0 : s, u.first_q, h);
      ahead.add(d_out[0], d_out.bytes, u.nq, c.dv * bytes_of(c.dtype));
    }
    int64_t products = Panels<T>::tiles(u.nk, c.dv) + Panels<T>::tiles(u.nk, u.nq) + Panels<T>::tiles(u.nq, c.d) +
                       Panels<T>::tiles(u.nk, c.d);
    ahead.spread(products);
  }

  void unit(const Unit<T>& u, Buffers<T>& own, double* bias, Ahead& ahead) const {
    bool scores = c.d_query || c.d_key || c.d_bias, apart = u.masked_by_query();
    int64_t dp = Panels<T>::padded(c.d), vp = Panels<T>::padded(c.dv);
    auto key_row = [&](int64_t k) { return u.key_row(k); };
    auto value_row = [&](int64_t k) { return u.value_row(k); };
    if (!c.kept) copy_rows(key_row, c.dtype, u.nk, c.d, own.keys);
    if (c.d_query) Panels<T>::pack_rows(key_row, c.dtype, u.nk, c.d, own.key_panels, own.rows);
    if (scores) copy_rows(value_row, c.dtype, u.nk, c.dv, own.values);
    if (c.d_query && apart) own.apart_keys.find(own.key_panels, u.nk, c.d);
    Rows d_out = rows_of(c.d_out, c.dtype, c.cu_q ? 0 : c.rows_q ? u.sample_q : u.sequence, u.first_q, u.head);
    d_out.index = u.query.index;
    int64_t size = block_queries<T>(u.nq, u.nk);
    // one block writes the sums, more of them add; a causal block may leave keys out
    bool add = u.nq > size || u.nq == 0 || c.causal;
    if (add) {
      std::fill_n(own.d_keys, u.nk * dp, T(0));
      std::fill_n(own.d_values, u.nk * vp, T(0));
    }
    for (int64_t i0 = 0; i0 < u.nq; i0 += size) {
      int64_t queries = std::min(size, u.nq - i0), keys = u.limit(i0 + queries), ld = round_up(queries, lanes),
              p_ld = ld;
      auto query_row = [&](int64_t i) { return u.query[i0 + i]; };
      auto d_out_row = [&](int64_t i) { return d_out[i0 + i]; };
      const T* p = own.p;
      if (c.kept) {
        p_ld = round_up(c.sq, 16);
        p = static_cast<const T*>(c.kept) + (u.sequence * c.heads + u.head) * c.sk * p_ld + i0;
      } else {
        Panels<T>::pack_columns(query_row, c.dtype, queries, c.d, own.query_columns, own.rows);
        Panels<T>::multiply(keys, ld, c.d, own.keys, c.d, Fixed<1>{}, own.query_columns, c.d, own.p, ld, false, true,
                            ahead);
        u.softmax(own.p, ld, i0, queries, keys, nullptr);
      }
      if (c.dropout > 0) u.dropout_factors(own.factor, ld, i0, queries, keys);
      if (c.d_value) {
        const T* weights = p;
        int64_t weights_ld = p_ld;
        if (c.dropout > 0) {
          multiply_each(p, p_ld, own.factor, ld, own.x, ld, queries, keys);
          weights = own.x, weights_ld = ld;
        }
        Panels<T>::pack_rows(d_out_row, c.dtype, queries, c.dv, own.d_out_panels, own.rows);
        if (apart) own.apart_d_out.find(own.d_out_panels, queries, c.dv);
        Panels<T>::multiply(keys, c.dv, queries, weights, weights_ld, Fixed<1>{}, own.d_out_panels, queries,
                            own.d_values, vp, add, true, ahead);
        if (apart) own.apart_d_out.add(keys, weights, weights_ld, 1, queries, own.d_values, vp);
      }
      if (!scores) continue;
      Panels<T>::pack_columns(d_out_row, c.dtype, queries, c.dv, own.d_out_columns, own.rows);
      Panels<T>::multiply(keys, ld, c.dv, own.values, c.dv, Fixed<1>{}, own.d_out_columns, c.dv, own.x, ld, false, true,
                          ahead);
      score_gradients(u, own, p, p_ld, ld, i0, queries, keys);
      if (c.d_bias) add_bias(u, own.x, ld, i0, queries, keys, bias);
      if (c.d_query) {
        Panels<T>::multiply(queries, c.d, keys, own.x, Fixed<1>{}, ld, own.key_panels, u.nk, own.d_queries, dp, false,
                            true, ahead);
        if (apart) own.apart_keys.add(queries, own.x, 1, ld, keys, own.d_queries, dp);
        for (int64_t i = 0; i < queries; ++i)
          write_row(own.d_queries + i * dp, T(c.scale), c.d, query_gradient(u, i0 + i));
      }
      if (c.d_key) {
        Panels<T>::pack_rows(query_row, c.dtype, queries, c.d, own.query_panels, own.rows);
        if (apart) own.apart_queries.find(own.query_panels, queries, c.d);
        Panels<T>::multiply(keys, c.d, queries, own.x, ld, Fixed<1>{}, own.query_panels, queries, own.d_keys, dp, add,
                            true, ahead);
        if (apart) own.apart_queries.add(keys, own.x, ld, 1, queries, own.d_keys, dp);
      }
    }
    write_keys(u, own.d_keys, T(c.scale), c.d, c.d_key);
    write_keys(u, own.d_values, T(1), c.dv, c.d_value);
    if (c.d_query && !plan.accumulate && !c.cu_q)
      for (int64_t i = u.nq; i < c.sq; ++i) zero_bytes(query_gradient(u, i), c.d * bytes_of(c.gradient_dtype));
  }

  // own.x: V dO^T becomes dS^T.
  void score_gradients(const Unit<T>& u, Buffers<T>& own, const T* p, int64_t p_ld, int64_t ld, int64_t i0,
                       int64_t queries, int64_t keys) const {
    T* x = own.x;
    auto add_probs = [&] {
      int64_t start = (u.sequence * c.heads + u.head) * c.sq;
      u.visit_plane(
          queries, keys,
          [&](T* to, int64_t i, int64_t k, int64_t count) {
            u.read_row(c.d_probs, c.dtype, (start + i0 + i) * c.sk, 1, k, count, to);
          },
          [&](int64_t k, int64_t i, V value) { store(x + k * ld + i, V(load(x + k * ld + i) + value)); });
    };
    if (c.d_probs && c.probs_dropout) add_probs();
    if (c.dropout > 0) multiply_each(x, ld, own.factor, ld, x, ld, queries, keys);
    if (c.d_probs && !c.probs_dropout) add_probs();
    for (int64_t i = 0; i < queries; i += lanes) {
      V inner{};
      for (int64_t k = 0; k < keys; ++k) {
        V weight = load(p + k * p_ld + i);
        inner += weight == T(0) ? V{} : weight * load(x + k * ld + i);
      }
      if (c.d_lse)
        for (int64_t l = 0; l < std::min(lanes, queries - i); ++l) inner[l] -= *d_lse_at(u, i0 + i + l);
      for (int64_t k = 0; k < keys; ++k) {
        V weight = load(p + k * p_ld + i);
        // what the excluded pair would have had may not even be a number
        store(x + k * ld + i, V(weight == T(0) ? V{} : weight * (load(x + k * ld + i) - inner)));
      }
    }
  }

  const T* d_lse_at(const Unit<T>& u, int64_t i) const {
    return static_cast<const T*>(c.d_lse) +
           (c.cu_q ? (u.first_q + i) * c.heads + u.head : (u.sequence * c.heads + u.head) * c.sq + i);
  }

  void add_bias(const Unit<T>& u, const T* x, int64_t ld, int64_t i0, int64_t queries, int64_t keys,
                double* sums) const {
    int64_t rows = c.bias_shape[2], columns = c.bias_shape[3];
    for (int64_t k = 0; k < keys; ++k) {
      double* to = sums + (columns == 1 ? 0 : u.position(k)) * rows;
      const T* from = x + k * ld;
      if (rows == 1) {
        double sum = 0;
        for (int64_t i = 0; i < queries; ++i) sum += double(from[i]);
        *to += sum;
      } else {
        for (int64_t i = 0; i < queries; ++i) to[i0 + i] += double(from[i]);
      }
    }
  }
};

template <class T>
void backward(const Attention* const* calls, int count, int threads) {
  Room room;
  int64_t pieces = 0, shared_count = 0, slot_count = 0;
  double work = 0;
  std::vector<Plan> plans;
  for (int i = 0; i < count; ++i) {
    const Attention& c = *calls[i];
    room.cover<T>(c);
    const Plan& plan = plans.emplace_back(c);
    pieces += plan.pieces(c);
    slot_count = std::max(slot_count, plan.slot_count);
    if (plan.shared_bias) shared_count += plan.pieces(c) * plan.slot_count;
    work += double(c.sequences * c.heads) * double(room.queries) * double(room.keys) * 2 * double(c.d + c.dv + 8);
  }
  threads = threads_for(work, pieces, threads);
  // what was kept needs no scores
  auto bias_count = [&](const Attention& c) { return c.kept ? 0 : shared_bias_count<T>(c); };
  int64_t bias_space = 0;
  for (int i = 0; i < count; ++i) bias_space += Scratch::space(bias_count(*calls[i]), sizeof(T));
  Scratch scratch(threads * Buffers<T>::space(room, slot_count) + Scratch::space(shared_count, 8) + bias_space);
  double* shared = scratch.take<double>(shared_count);
  std::vector<Backward<T>> directions;
  for (int i = 0; i < count; ++i) {
    T* bias = bias_count(*calls[i]) ? scratch.take<T>(bias_count(*calls[i])) : nullptr;
    if (bias) transpose_bias(*calls[i], bias);
    directions.emplace_back(*calls[i], plans[size_t(i)], shared, bias).clear();
    if (plans[size_t(i)].shared_bias) shared += plans[size_t(i)].pieces(*calls[i]) * plans[size_t(i)].slot_count;
  }
  std::vector<Buffers<T>> own;
  for (int t = 0; t < threads; ++t) own.emplace_back(scratch, room, slot_count);
  int64_t heads = calls[0]->heads;
  Queue queue(pieces, pieces >= 8 * threads * heads ? heads : 1);
  parallel(threads, [&](const Team& team) {
    queue.work([&](int64_t at) {
      int which = 0;
      for (; at >= plans[size_t(which)].pieces(*calls[which]); ++which)
        at -= plans[size_t(which)].pieces(*calls[which]);
      directions[size_t(which)].piece(at, own[size_t(team.rank)]);
    });
  });
  for (const Backward<T>& direction : directions) direction.finish(own[0].bias);
}

}  // namespace

int attention_bwd(const Attention* const* calls, int count, int threads) {
  for (int i = 0; i < count; ++i)
    if (!within_bounds(*calls[i])) return 1;
  if (calls[0]->dtype == DType::float64)
    backward<double>(calls, count, threads);
  else
    backward<float>(calls, count, threads);
  return 0;
}

}  // namespace vlmfast::VLMFAST_ISA
