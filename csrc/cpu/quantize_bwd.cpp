// Gradients of relaxed quantization. With x = dz C^T, y = exp(s - lse) from the same noise and q = exp(l - plain):
//   dl = gain y (x - mean) + q (kl (l - expected) - plain_gain (x - plain_mean)), (x - mean) more at the chosen entry,
//   dC = y^T dz,
// the means being those of x, dz times the mean code.
// A thread owns a range of the vocabulary and walks over all positions: no sum crosses threads.
#include "quantize_tiles.h"

#include <vector>

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class T>
class Backward {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes, ld = tile_positions;
  const QuantizeBackward& g;
  const Quantize& c;
  int64_t entries_each, blocks, padded;
  T *rows, *columns;       // dz of each block as the B operand over positions, and over the width
  T *means, *plain_means;  // [N]

 public:
  struct Buffers {
    T *logits, *scores, *given, *x, *codes, *d_codes, *square;
  };

  explicit Backward(const QuantizeBackward& call)
      : g(call),
        c(call.call),
        // short vocabularies in smaller pieces, so that there are some for every thread
        entries_each(c.vocabulary >= 16 * tile_entries ? tile_entries : tile_entries / 4),
        blocks(ceil_div(c.positions, tile_positions)),
        padded(Panels<T>::padded(c.width)) {}

  int64_t pieces() const { return ceil_div(c.vocabulary, entries_each); }
  int64_t shared_space() const {
    return Scratch::space(c.batch * blocks * ld * padded, sizeof(T)) +
           Scratch::space(c.batch * blocks * ld * c.width, sizeof(T)) +
           2 * Scratch::space(c.batch * c.positions, sizeof(T));
  }
  static int64_t space(const Quantize& c) {
    return 4 * Scratch::space(tile_entries * ld, sizeof(T)) +
           Scratch::space(tile_entries * Panels<T>::padded(c.width), sizeof(T)) +
           Scratch::space(lanes * round_up(std::max<int64_t>(c.width, lanes), lanes), sizeof(T));
  }
  Buffers take(Scratch& scratch) const {
    Buffers own;
    for (T** part : {&own.logits, &own.scores, &own.given, &own.x}) *part = scratch.take<T>(tile_entries * ld);
    own.d_codes = scratch.take<T>(tile_entries * padded);
    own.square = scratch.take<T>(lanes * round_up(std::max<int64_t>(c.width, lanes), lanes));
    return own;
  }
  void take_shared(Scratch& scratch) {
    rows = scratch.take<T>(c.batch * blocks * ld * padded);
    columns = scratch.take<T>(c.batch * blocks * ld * c.width);
    means = scratch.take<T>(c.batch * c.positions);
    plain_means = scratch.take<T>(c.batch * c.positions);
  }

  void pack(const Team& team, Buffers& own) const {
    for (int64_t block = team.rank; block < c.batch * blocks; block += team.size) {
      auto [first, count] = span(block);
      auto row_at = [&, first = first](int64_t i) {
        return reinterpret_cast<const char*>(static_cast<const T*>(g.d_z) + (first + i) * c.width);
      };
      Panels<T>::pack_columns(row_at, Plain<T>::stored, count, c.width, columns + block * ld * c.width, own.square);
      Panels<T>::pack_rows(row_at, Plain<T>::stored, count, c.width, rows + block * ld * padded, nullptr);
      for (int64_t n = first; n < first + count; ++n) {
        if (g.mean_code) means[n] = with_code(g.mean_code, n);
        if (g.plain_code) plain_means[n] = with_code(g.plain_code, n);
      }
    }
  }

  void piece(int64_t index, Buffers& own) const {
    int64_t v0 = index * entries_each, entries = std::min(entries_each, c.vocabulary - v0);
    const T* codes = static_cast<const T*>(c.codebook) + v0 * c.width;
    Ahead nothing;
    if (g.d_codebook) std::fill_n(own.d_codes, entries * padded, T(0));
    for (int64_t block = 0; block < c.batch * blocks; ++block) {
      auto [first, count] = span(block);
      int64_t b = block / blocks, p0 = block % blocks * tile_positions, whole = round_up(count, lanes);
      read_tile(c.logits, b, p0, count, v0, entries, own.logits, ld, own.square);
      add_noise(c, b, p0, count, v0, entries, own.logits, own.scores, ld, own.given, own.square);
      weights(own.scores, static_cast<const T*>(c.lse) + first, count, entries);
      if (g.d_codebook)
        Panels<T>::multiply(entries, c.width, count, own.scores, ld, Fixed<1>{}, rows + block * ld * padded, count,
                            own.d_codes, padded, true, true, nothing);
      if (!g.d_logits.at) continue;
      if (g.d_z)
        Panels<T>::multiply(entries, whole, c.width, codes, c.width, Fixed<1>{}, columns + block * ld * c.width, c.width,
                            own.x, ld, false, true, nothing);
      logit_gradients(own, first, count, v0, entries);
      write_tile(g.d_logits, b, p0, count, v0, entries, own.x, ld, own.square);
    }
    if (g.d_codebook)
      for (int64_t v = 0; v < entries; ++v)
        std::copy_n(own.d_codes + v * padded, c.width, static_cast<T*>(g.d_codebook) + (v0 + v) * c.width);
  }

 private:
  struct Span {
    int64_t first, count;
  };
  Span span(int64_t block) const {
    int64_t p0 = block % blocks * tile_positions;
    return {block / blocks * c.positions + p0, std::min(tile_positions, c.positions - p0)};
  }

  // a b + c rounded as in the products; a plain loop is vectorised with two roundings.
  static T fused(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
  }

  // dz times a code, summed one by one as the product dz C^T is: a sure choice, whose mean code is its own, then has a
  // gradient of 0 and not of rounding errors, which a small tau would blow up.
  T with_code(const void* codes, int64_t n) const {
    const T *up = static_cast<const T*>(g.d_z) + n * c.width, *code = static_cast<const T*>(codes) + n * c.width;
    T sum = 0;
    for (int64_t e = 0; e < c.width; ++e) sum = fused(code[e], up[e], sum);
    return sum;
  }

  // Vector of one number a position; lanes behind the last are 0.
  static V lanes_of(const void* values, int64_t first, int64_t i, int64_t count) {
    V result{};
    const T* from = static_cast<const T*>(values) + first + i;
    if (i + lanes <= count) return load(from);
    for (int64_t l = 0; i + l < count; ++l) result[l] = from[l];
    return result;
  }

  // A position whose entries are all -inf has a log-sum-exp of -inf, and weights of 0.
  static V finite(V norm) { return norm == -std::numeric_limits<T>::infinity() ? V{} : norm; }

  void weights(T* s, const T* lse, int64_t count, int64_t entries) const {
    for (int64_t i = 0; i < count; i += lanes) {
      V norm = finite(lanes_of(lse, 0, i, count));
      for (int64_t v = 0; v < entries; ++v)
        store(s + v * ld + i, V(exp_of_difference<T>(load(s + v * ld + i) - norm)));
      // positions behind the last weigh nothing in the codebook's gradient
      if (i + lanes > count)
        for (int64_t v = 0; v < entries; ++v)
          for (int64_t l = count - i; l < lanes; ++l) s[v * ld + i + l] = 0;
    }
  }

  // own.x = dz C^T becomes dl.
  void logit_gradients(Buffers& own, int64_t first, int64_t count, int64_t v0, int64_t entries) const {
    T gain = T(g.gain), kl = T(g.kl), plain_gain = T(g.plain_gain);
    for (int64_t i = 0; i < count; i += lanes) {
      V mean = g.d_z ? lanes_of(means, first, i, count) : V{}, plain{}, expected{}, plain_mean{};
      if (kl != 0 || plain_gain != 0) plain = finite(lanes_of(c.plain, first, i, count));
      if (kl != 0) expected = lanes_of(c.expected, first, i, count);
      if (plain_gain != 0) plain_mean = lanes_of(plain_means, first, i, count);
      for (int64_t v = 0; v < entries; ++v) {
        int64_t at = v * ld + i;
        V x = g.d_z ? load(own.x + at) : V{}, d = gain * load(own.scores + at) * (x - mean);
        if (kl != 0 || plain_gain != 0) {
          V l = load(own.logits + at), q = exp_of_difference<T>(l - plain);
          V term = kl * (l - expected) - plain_gain * (x - plain_mean);
          d += q == T(0) ? V{} : q * term;
        }
        store(own.given + at, d);
      }
      if (g.call.indices && g.d_z)
        for (int64_t l = 0; l < std::min(lanes, count - i); ++l) {
          int64_t v = c.indices[first + i + l] - v0;
          bool chosen = v >= 0 && v < entries && !std::isinf(own.logits[v * ld + i + l]);
          if (chosen) own.given[v * ld + i + l] += own.x[v * ld + i + l] - mean[l];
        }
    }
    std::swap(own.x, own.given);
  }
};

template <class T>
void backward(const QuantizeBackward& g) {
  const Quantize& c = g.call;
  Backward<T> kernel(g);
  double work = double(c.batch * c.positions) * double(c.vocabulary) * double(60 + 2 * c.width);
  int threads = threads_for(work, kernel.pieces(), c.threads);
  Scratch scratch((g.d_z ? kernel.shared_space() : 0) + threads * Backward<T>::space(c));
  if (g.d_z) kernel.take_shared(scratch);
  std::vector<typename Backward<T>::Buffers> own;
  for (int t = 0; t < threads; ++t) own.push_back(kernel.take(scratch));
  Queue queue(kernel.pieces(), 1);
  parallel(threads, [&](const Team& team) {
    auto& mine = own[size_t(team.rank)];
    if (g.d_z) kernel.pack(team, mine);
    team.barrier();
    queue.work([&](int64_t at) { kernel.piece(at, mine); });
  });
}

}  // namespace

void quantize_bwd(const QuantizeBackward& call) {
  if (call.call.logits.dtype == DType::float64)
    backward<double>(call);
  else
    backward<float>(call);
}

}  // namespace vlmfast::VLMFAST_ISA
