// Relaxed quantization, forward (Jang et al. 2017, eq. 2): Gumbel noise, a softmax with a running maximum over tiles of
// the vocabulary, and the weighted sum of the codebook. Logits are read once and nothing of their size is written.
#include "quantize_tiles.h"

#include <vector>

namespace vlmfast::VLMFAST_ISA {
namespace {

// The codebook's rows as the B operand of y^T C: tile_entries rows a panel set.
template <class T>
struct Codes {
  const T* panels;
  int64_t padded;
  static int64_t count(int64_t vocabulary, int64_t width) {
    return round_up(vocabulary, tile_entries) * Panels<T>::padded(width);
  }
  const T* tile(int64_t v0) const { return panels + v0 * padded; }
};

template <class T>
void pack_codes(const Team& team, const void* codebook, int64_t vocabulary, int64_t width, T* to) {
  constexpr DType plain = Plain<T>::stored;
  const T* rows = static_cast<const T*>(codebook);
  int64_t tiles = ceil_div(vocabulary, tile_entries), padded = Panels<T>::padded(width);
  for (int64_t tile = team.rank; tile < tiles; tile += team.size) {
    int64_t v0 = tile * tile_entries, entries = std::min(tile_entries, vocabulary - v0);
    Panels<T>::pack_rows([&](int64_t k) { return reinterpret_cast<const char*>(rows + (v0 + k) * width); }, plain,
                         entries, width, to + v0 * padded, nullptr);
  }
}

// Softmax statistics of one row that grow tile by tile: maximum, sum of exp(x - maximum), and that sum weighted by x.
template <class T>
struct Running {
  T *top, *sum, *weighted;
};

template <class T>
class Forward {
  using V = Vec<T>;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  static constexpr int64_t lanes = Simd<T>::lanes, ld = tile_positions;
  static constexpr T minus_infinity = -std::numeric_limits<T>::infinity();
  const Quantize& c;
  Codes<T> codes;
  int64_t blocks;

 public:
  struct Buffers {
    T *logits, *scores, *given, *sums, *square, *best, *factor;
    Int* index;
    Running<T> s, l;
  };

  Forward(const Quantize& call, const T* packed)
      : c(call),
        codes{packed, Panels<T>::padded(call.width)},
        blocks(ceil_div(call.positions, tile_positions)) {}

  int64_t pieces() const { return c.batch * blocks; }

  static int64_t space(const Quantize& c) {
    return 3 * Scratch::space(tile_entries * ld, sizeof(T)) +
           Scratch::space(ld * Panels<T>::padded(c.width), sizeof(T)) + Scratch::space(lanes, sizeof(T)) +
           9 * Scratch::space(ld, sizeof(T));
  }
  Buffers take(Scratch& scratch) const {
    Buffers own;
    for (T** part : {&own.logits, &own.scores, &own.given}) *part = scratch.take<T>(tile_entries * ld);
    own.sums = scratch.take<T>(ld * codes.padded);
    own.square = scratch.take<T>(lanes);
    own.index = scratch.take<Int>(ld);
    for (T** part : {&own.best, &own.factor, &own.s.top, &own.s.sum, &own.s.weighted, &own.l.top, &own.l.sum,
                     &own.l.weighted})
      *part = scratch.take<T>(ld);
    return own;
  }

  void piece(int64_t index, Buffers& own) const {
    int64_t b = index / blocks, p0 = index % blocks * tile_positions, count = std::min(tile_positions, c.positions - p0);
    bool soft = c.z || c.lse, kl = c.plain;
    for (Running<T>* r : {&own.s, &own.l}) {
      std::fill_n(r->top, ld, minus_infinity);
      std::fill_n(r->sum, ld, T(0));
      std::fill_n(r->weighted, ld, T(0));
    }
    std::fill_n(own.best, ld, minus_infinity);
    std::fill_n(own.index, ld, Int(0));
    if (c.z) std::fill_n(own.sums, ld * codes.padded, T(0));
    for (int64_t v0 = 0; v0 < c.vocabulary; v0 += tile_entries) {
      int64_t entries = std::min(tile_entries, c.vocabulary - v0);
      read_tile(c.logits, b, p0, count, v0, entries, own.logits, ld, own.square);
      add_noise(c, b, p0, count, v0, entries, own.logits, own.scores, ld, own.given, own.square);
      if (c.indices) largest(own, count, v0, entries);
      if (kl) grow<true>(own.l, own.logits, own.factor, count, entries);
      if (!soft) continue;
      grow<false>(own.s, own.scores, own.factor, count, entries);
      if (c.z) add_codes(own, count, v0, entries);
    }
    finish(own, b * c.positions + p0, count);
  }

 private:
  void largest(Buffers& own, int64_t count, int64_t v0, int64_t entries) const {
    for (int64_t i = 0; i < count; i += lanes) {
      V best = load(own.best + i);
      I at;
      memcpy(&at, own.index + i, sizeof at);
      for (int64_t v = 0; v < entries; ++v) {
        V x = load(own.scores + v * ld + i);
        auto better = x > best;
        best = better ? x : best;
        at = better ? I{} + Int(v0 + v) : at;
      }
      store(own.best + i, best);
      memcpy(own.index + i, &at, sizeof at);
    }
  }

  // exp(x - top) over the tile, in place; `factor` is what earlier sums are to be multiplied by.
  template <bool weighted>
  void grow(const Running<T>& r, T* x, T* factor, int64_t count, int64_t entries) const {
    for (int64_t i = 0; i < count; i += lanes) {
      V before = load(r.top + i), top = before;
      for (int64_t v = 0; v < entries; ++v) top = larger(load(x + v * ld + i), top);
      V base = top == minus_infinity ? V{} : top;
      // a tile is summed apart: thousands of terms one by one would cost digits
      V scale = exp_of_difference<T>(before - base), sum{}, moment{};
      for (int64_t v = 0; v < entries; ++v) {
        V value = load(x + v * ld + i), e = exp_of_difference<T>(value - base);
        if constexpr (weighted) {
          // an entry of -inf counts for nothing
          moment += e == T(0) ? V{} : e * value;
        } else {
          store(x + v * ld + i, e);
        }
        sum += e;
      }
      store(r.top + i, top), store(factor + i, scale);
      store(r.sum + i, V(load(r.sum + i) * scale + sum));
      store(r.weighted + i, V(load(r.weighted + i) * scale + moment));
    }
  }

  void add_codes(Buffers& own, int64_t count, int64_t v0, int64_t entries) const {
    for (int64_t i = 0; i < count; ++i) {
      T factor = own.factor[i];
      T* row = own.sums + i * codes.padded;
      if (factor != T(1) && v0 > 0)
        for (int64_t e = 0; e < codes.padded; e += lanes) store(row + e, V(load(row + e) * factor));
    }
    Ahead nothing;
    Panels<T>::multiply(count, c.width, entries, own.scores, Fixed<1>{}, ld, codes.tile(v0), entries, own.sums,
                        codes.padded, true, true, nothing);
  }

  void finish(const Buffers& own, int64_t n, int64_t count) const {
    T* z = static_cast<T*>(c.z);
    for (int64_t i = 0; i < count; ++i) {
      if (c.indices) c.indices[n + i] = own.index[i];
      if (c.lse) static_cast<T*>(c.lse)[n + i] = own.s.top[i] + std::log(own.s.sum[i]);
      if (c.plain) {
        static_cast<T*>(c.plain)[n + i] = own.l.top[i] + std::log(own.l.sum[i]);
        static_cast<T*>(c.expected)[n + i] = own.l.sum[i] == 0 ? T(0) : own.l.weighted[i] / own.l.sum[i];
      }
      if (!z) continue;
      T share = own.s.sum[i] == 0 ? T(0) : 1 / own.s.sum[i];  // every entry may be -inf
      for (int64_t e = 0; e < c.width; ++e) z[(n + i) * c.width + e] = share * own.sums[i * codes.padded + e];
    }
  }
};

template <class T>
void forward(const Quantize& c) {
  int64_t packed_count = c.z ? Codes<T>::count(c.vocabulary, c.width) : 0;
  int64_t pieces = c.batch * ceil_div(c.positions, tile_positions);
  double work = double(c.batch * c.positions) * double(c.vocabulary) * double(30 + (c.z ? c.width : 0));
  int threads = threads_for(work, pieces, c.threads);
  Scratch scratch(Scratch::space(packed_count, sizeof(T)) + threads * Forward<T>::space(c));
  T* packed = scratch.take<T>(packed_count);
  Forward<T> kernel(c, packed);
  std::vector<typename Forward<T>::Buffers> own;
  for (int t = 0; t < threads; ++t) own.push_back(kernel.take(scratch));
  Queue queue(pieces, 1);
  parallel(threads, [&](const Team& team) {
    if (c.z) pack_codes(team, c.codebook, c.vocabulary, c.width, packed);
    team.barrier();
    queue.work([&](int64_t at) { kernel.piece(at, own[size_t(team.rank)]); });
  });
}

// The largest of W f + b without the logits: tiles of W times the features of a block of positions, which stay packed.
template <class T>
class Encoder {
  using V = Vec<T>;
  using I = typename Simd<T>::I;
  using Int = typename Simd<T>::Int;
  static constexpr int64_t lanes = Simd<T>::lanes, ld = tile_positions;
  const Encode& c;
  int64_t blocks;

 public:
  struct Buffers {
    T *features, *scores, *tile, *square;
  };
  explicit Encoder(const Encode& call) : c(call), blocks(ceil_div(call.positions, tile_positions)) {}
  int64_t pieces() const { return c.batch * blocks; }
  static int64_t space(const Encode& c) {
    return Scratch::space(Panels<T>::size(c.width, ld), sizeof(T)) + Scratch::space(tile_entries * ld, sizeof(T)) +
           Scratch::space(round_up(c.width, lanes) * ld, sizeof(T)) + Scratch::space(lanes, sizeof(T));
  }
  Buffers take(Scratch& scratch) const {
    Buffers own;
    own.features = scratch.take<T>(Panels<T>::size(c.width, ld));
    own.scores = scratch.take<T>(tile_entries * ld);
    own.tile = scratch.take<T>(round_up(c.width, lanes) * ld);
    own.square = scratch.take<T>(lanes);
    return own;
  }

  void piece(int64_t index, Buffers& own) const {
    int64_t b = index / blocks, p0 = index % blocks * tile_positions, count = std::min(tile_positions, c.positions - p0);
    int64_t whole = round_up(count, lanes);
    read_tile(c.features, b, p0, count, 0, c.width, own.tile, ld, own.square);
    Panels<T>::pack_rows([&](int64_t k) { return reinterpret_cast<const char*>(own.tile + k * ld); }, Plain<T>::stored,
                         c.width, whole, own.features, nullptr);
    V best[tile_positions / Simd<T>::lanes];
    I at[tile_positions / Simd<T>::lanes];
    for (int64_t g = 0; g < whole / lanes; ++g)
      best[g] = broadcast(-std::numeric_limits<T>::infinity()), at[g] = I{};
    Ahead nothing;
    const T* weight = static_cast<const T*>(c.weight);
    const T* bias = static_cast<const T*>(c.bias);
    for (int64_t v0 = 0; v0 < c.vocabulary; v0 += tile_entries) {
      int64_t entries = std::min(tile_entries, c.vocabulary - v0);
      Panels<T>::multiply(entries, whole, c.width, weight + v0 * c.width, c.width, Fixed<1>{}, own.features, c.width,
                          own.scores, ld, false, true, nothing);
      for (int64_t g = 0; g < whole / lanes; ++g)
        for (int64_t v = 0; v < entries; ++v) {
          V x = load(own.scores + v * ld + g * lanes) + (bias ? bias[v0 + v] : T(0));
          auto better = x > best[g];
          best[g] = better ? x : best[g];
          at[g] = better ? I{} + Int(v0 + v) : at[g];
        }
    }
    for (int64_t i = 0; i < count; ++i) c.indices[b * c.positions + p0 + i] = at[i / lanes][i % lanes];
  }
};

template <class T>
void encode(const Encode& c) {
  Encoder<T> kernel(c);
  double work = double(c.batch * c.positions) * double(c.vocabulary) * double(c.width);
  int threads = threads_for(work, kernel.pieces(), c.threads);
  Scratch scratch(threads * Encoder<T>::space(c));
  std::vector<typename Encoder<T>::Buffers> own;
  for (int t = 0; t < threads; ++t) own.push_back(kernel.take(scratch));
  Queue queue(kernel.pieces(), 1);
  parallel(threads, [&](const Team& team) {
    queue.work([&](int64_t piece) { kernel.piece(piece, own[size_t(team.rank)]); });
  });
}

template <class T>
void noise(int64_t rows, int64_t vocabulary, uint64_t seed, uint64_t offset, T* to, int threads) {
  constexpr int64_t lanes = Simd<T>::lanes;
  int64_t pieces = ceil_div(rows, lanes);
  threads = threads_for(double(rows) * double(vocabulary) * 30, pieces, threads);
  Queue queue(pieces, 1);
  parallel(threads, [&](const Team&) {
    queue.work([&](int64_t piece) {
      int64_t n = piece * lanes, count = std::min(lanes, rows - n);
      Gumbel<T> gumbel(seed, offset + uint64_t(n));
      for (int64_t v = 0; v < vocabulary; v += 4) {
        Vec<T> drawn[4];
        gumbel.draw(uint32_t(v / 4), drawn);
        for (int64_t l = 0; l < count; ++l)
          for (int64_t w = 0; w < std::min<int64_t>(4, vocabulary - v); ++w) to[(n + l) * vocabulary + v + w] = drawn[w][l];
      }
    });
  });
}

}  // namespace

void quantize_fwd(const Quantize& call) {
  if (call.logits.dtype == DType::float64)
    forward<double>(call);
  else
    forward<float>(call);
}

void encode_indices(const Encode& call) {
  if (call.wide)
    encode<double>(call);
  else
    encode<float>(call);
}

void gumbel_noise(int64_t rows, int64_t vocabulary, uint64_t seed, uint64_t offset, bool wide, void* to, int threads) {
  if (wide)
    noise(rows, vocabulary, seed, offset, static_cast<double*>(to), threads);
  else
    noise(rows, vocabulary, seed, offset, static_cast<float*>(to), threads);
}

}  // namespace vlmfast::VLMFAST_ISA
