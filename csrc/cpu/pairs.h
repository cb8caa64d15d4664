// How the contrastive losses walk the N x M logits: tiles that stay in the second-level cache, their products, and the
// order in which threads visit them.
//
// Threads own groups of row blocks; in step s thread t visits the column group (t + s) mod T, so that no two threads
// ever share a line: every sum has one owner at a time and an order that depends on T alone.
#pragma once
#include <algorithm>
#include <type_traits>

#include "gemm.h"
#include "info_nce.h"
#include "parallel.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

using namespace cpu;

constexpr int most_threads = 64;

// Beyond this spread a tile's shared exponent could push a line's sum towards the subnormal numbers.
constexpr double max_spread = 60;
// exp(x - unreachable) is 0 without becoming inf - inf: the normaliser of a line that has no weight.
constexpr double unreachable = 1e30;

double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
double sigmoid(double x) { return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x)); }

template <class Product>
struct Tiling {
  using T = typename Product::T;
  static constexpr int64_t NR = Gemm<Product>::NR, MR = Gemm<Product>::MR;
  int64_t rows, columns;  // of a block
  int64_t row_blocks, column_blocks, padded;
  int threads;

  explicit Tiling(const Pairs& p) {
    // about 0.3 MB each for the tile and for the block of image rows, which share the second-level cache
    int64_t depth = std::max<int64_t>(p.d, 1);
    int64_t most_rows = std::clamp<int64_t>(168 * 512 * 4 / (depth * int64_t(sizeof(T))), 4 * MR, 168);
    int64_t most_columns = 480 * 4 / int64_t(sizeof(T));
    double work = double(p.n) * double(p.m) * double(depth);
    int64_t wanted = std::min<int64_t>({p.threads, most_threads, int64_t(work / 1e6) + 1, ceil_div(p.n, MR), ceil_div(p.m, NR)});
    threads = int(std::max<int64_t>(wanted, 1));
    rows = block(p.n, most_rows, MR);
    columns = block(p.m, most_columns, NR);
    row_blocks = ceil_div(p.n, rows);
    column_blocks = ceil_div(p.m, columns);
    threads = int(std::max<int64_t>(std::min<int64_t>({threads, row_blocks, column_blocks}), 1));
    padded = round_up(p.m, NR);
  }

  // Equal blocks, a multiple of `threads` of them where the lines suffice.
  int64_t block(int64_t lines, int64_t most, int64_t unit) const {
    int64_t blocks = threads * std::max<int64_t>(ceil_div(lines, threads * most), 1);
    return std::min(round_up(std::max<int64_t>(ceil_div(lines, blocks), 1), unit), round_up(most, unit));
  }

  // Elements of the kept tiles; their exponents follow.
  int64_t kept() const { return row_blocks * rows * padded; }
};

// One block of the logits.
struct Tile {
  int64_t i0, rows, j0, width, stride;  // stride: the width rounded up to whole panels; the rest is padding
  int64_t index;                        // among all tiles
  int64_t kept_at;
};

// What a whole-vector pass over a tile finds.
template <class T>
struct Range {
  T top, bottom;
};

template <class Product>
struct Walk {
  using T = typename Product::T;
  using Operand = typename Product::Operand;
  using V = Vec<T>;
  static constexpr bool paired = !std::is_same_v<T, Operand>;
  static constexpr int lanes = Simd<T>::lanes;
  static constexpr int64_t NR = Gemm<Product>::NR;
  static constexpr T minus_infinity = -std::numeric_limits<T>::infinity();

  const Pairs& p;
  Tiling<Product> tiling;
  T scale, bias;
  int64_t depth;  // steps of K along a row
  bool convert;   // rows become operands block by block, or already are and stay where they are

  explicit Walk(const Pairs& pairs)
      : p(pairs), tiling(pairs), scale(*static_cast<const T*>(pairs.scale)),
        bias(pairs.bias ? *static_cast<const T*>(pairs.bias) : T(0)), depth(Product::depth(pairs.d)),
        convert(paired || pairs.dtype != Product::stored) {}

  bool valid() const { return scale == scale && bias == bias; }
  bool diagonal() const { return p.labels == nullptr; }

  // Memory that each thread needs to compute a tile.
  struct Buffers {
    Operand *row, *image;
    T *numbers, *tile;
  };
  int64_t thread_space() const {
    int64_t wide = round_up(std::max<int64_t>(p.d, 1), NR);
    return Scratch::space(wide, sizeof(Operand)) + Scratch::space(convert ? tiling.rows * depth : 0, sizeof(Operand)) +
           Scratch::space(wide, sizeof(T)) + Scratch::space(tiling.rows * tiling.columns, sizeof(T));
  }
  Buffers take(Scratch& scratch) const {
    int64_t wide = round_up(std::max<int64_t>(p.d, 1), NR);
    Operand* row = scratch.template take<Operand>(wide);
    Operand* image = scratch.template take<Operand>(convert ? tiling.rows * depth : 0);
    T* numbers = scratch.template take<T>(wide);
    return {row, image, numbers, scratch.template take<T>(tiling.rows * tiling.columns)};
  }
  // The text packed for the logits, shared by all threads.
  int64_t packed_count() const { return tiling.padded * depth; }

  const char* image_row(int64_t i) const {
    return static_cast<const char*>(p.image) + i * p.image_row * bytes_of(p.dtype);
  }
  const char* text_row(int64_t j) const {
    return static_cast<const char*>(p.text) + j * p.text_row * bytes_of(p.dtype);
  }

  // Text as [padded / NR][depth][NR]; each thread packs its share of the panels.
  void pack_text(const Team& team, Operand* packed, Operand* row_buffer) const {
    int64_t panels = tiling.padded / NR;
    for (int64_t panel = panels * team.rank / team.size; panel < panels * (team.rank + 1) / team.size; ++panel)
      Gemm<Product>::pack_transposed(text_row(panel * NR), p.dtype, p.text_row, std::min(NR, p.m - panel * NR), p.d,
                                     packed + panel * NR * depth, row_buffer);
  }

  // visit(tile, first_of_row_block, first_of_column_block) in the order described above.
  template <class Begin, class Visit>
  void tiles(const Team& team, Begin begin_rows, Visit visit) const {
    int64_t I0 = tiling.row_blocks * team.rank / team.size, I1 = tiling.row_blocks * (team.rank + 1) / team.size;
    for (int step = 0; step < team.size; ++step) {
      int group = (team.rank + step) % team.size;
      int64_t J0 = tiling.column_blocks * group / team.size, J1 = tiling.column_blocks * (group + 1) / team.size;
      for (int64_t I = I0; I < I1; ++I) {
        Tile tile;
        tile.i0 = I * tiling.rows;
        tile.rows = std::min(tiling.rows, p.n - tile.i0);
        begin_rows(tile.i0, tile.rows);
        for (int64_t J = J0; J < J1; ++J) {
          tile.j0 = J * tiling.columns;
          tile.width = std::min(tiling.columns, p.m - tile.j0);
          tile.stride = round_up(tile.width, NR);
          tile.index = I * tiling.column_blocks + J;
          tile.kept_at = tile.i0 * tiling.padded + tile.rows * tile.j0;
          visit(tile, step == 0 && J == J0, step == 0 && I == I0);
        }
      }
      team.barrier();
    }
  }

  void convert_block(int64_t i0, int64_t rows, Operand* image) const {
    if (convert)
      for (int64_t i = 0; i < rows; ++i) Product::row(image_row(i0 + i), p.dtype, p.d, image + i * depth);
  }

  void dot_products(const Tile& t, const Operand* image, const Operand* packed, T* out) const {
    const Operand* rows = convert ? image : reinterpret_cast<const Operand*>(image_row(t.i0));
    int64_t row_stride = convert ? depth : p.image_row;
    Gemm<Product>::run(t.rows, t.width, depth, rows, row_stride, Fixed<1>{}, packed + t.j0 * depth, depth * NR, out,
                       t.stride, false, true);
  }

  bool crosses_diagonal(const Tile& t) const {
    int64_t first = t.i0 + p.offset, last = first + t.rows - 1;
    return diagonal() && last >= t.j0 && first < t.j0 + t.width;
  }
  // The rows of a tile that hold a diagonal positive.
  int64_t first_diagonal(const Tile& t) const { return std::max<int64_t>(0, t.j0 - p.offset - t.i0); }
  int64_t last_diagonal(const Tile& t) const { return std::min(t.rows, t.j0 + t.width - p.offset - t.i0); }
  int64_t diagonal_column(const Tile& t, int64_t i) const { return t.i0 + i + p.offset - t.j0; }

  bool masked(const Tile& t, int64_t i, int64_t j) const {
    return p.mask[(t.i0 + i) * p.mask_row + (t.j0 + j) * p.mask_column] != 0;
  }

  // Dot products become logits.
  void apply_scale(const Tile& t, T* s) const {
    for (int64_t at = 0; at < t.rows * t.stride; at += lanes) store(s + at, V(load(s + at) * scale + bias));
  }

  // Logits that do not count in the log-sum-exp become -inf: padding, masked pairs, the diagonal.
  void exclude(const Tile& t, T* s) const {
    for (int64_t i = 0; i < t.rows; ++i) {
      T* row = s + i * t.stride;
      if (p.mask)
        for (int64_t j = 0; j < t.width; ++j)
          if (masked(t, i, j)) row[j] = minus_infinity;
      for (int64_t j = t.width; j < t.stride; ++j) row[j] = minus_infinity;
    }
    if (crosses_diagonal(t))
      for (int64_t i = first_diagonal(t); i < last_diagonal(t); ++i)
        s[i * t.stride + diagonal_column(t, i)] = minus_infinity;
  }

  bool needs_exclusion(const Tile& t) const { return p.mask || t.width != t.stride || crosses_diagonal(t); }

  // Largest and smallest value of factor * s + shift that is not -inf.
  Range<T> range(const Tile& t, const T* s, T factor, T shift) const {
    V top = broadcast(minus_infinity), bottom = broadcast(-minus_infinity);
    for (int64_t at = 0; at < t.rows * t.stride; at += lanes) {
      V x = load(s + at);
      top = larger(x, top);
      bottom = smaller(x == minus_infinity ? broadcast(-minus_infinity) : x, bottom);
    }
    T highest = max_lanes<T>(top), lowest = -max_lanes<T>(V(-bottom));
    if (highest == minus_infinity) return {highest, highest};
    T a = highest * factor + shift, b = lowest * factor + shift;
    return {std::max(a, b), std::min(a, b)};
  }

  static bool shares_exponent(Range<T> r) { return r.top - r.bottom < T(max_spread); }
};

// Both towers' gradients from tiles of the logits' gradient.
template <class Product>
struct Spread {
  using T = typename Product::T;
  using Operand = typename Product::Operand;
  static constexpr bool paired = Walk<Product>::paired;
  static constexpr int64_t NR = Gemm<Product>::NR;

  const Walk<Product>& walk;
  void *d_image, *d_text;
  DType dtype;
  T *image_sum, *text_sum;  // working sums
  Operand* text_rows;       // [D / NR][depth of M][NR]
  struct Buffers {
    Operand *image_rows, *by_row, *by_column;  // image [D / NR][depth of rows][NR]; the tile as pairs both ways
  };

  Spread(const Walk<Product>& w, void* image, void* text, DType gradient_dtype)
      : walk(w), d_image(image), d_text(text), dtype(gradient_dtype) {}

  bool in_place() const { return dtype == (sizeof(T) == 4 ? DType::float32 : DType::float64); }
  int64_t wide() const { return round_up(walk.p.d, NR); }
  int64_t text_depth() const { return Product::depth(walk.p.m); }
  int64_t shared_space() const {
    const Pairs& p = walk.p;
    return Scratch::space(d_image ? text_depth() * wide() : 0, sizeof(Operand)) +
           Scratch::space(d_image && !in_place() ? p.n * p.d : 0, sizeof(T)) +
           Scratch::space(d_text && !in_place() ? p.m * p.d : 0, sizeof(T));
  }
  int64_t image_rows_count() const { return d_text ? Product::depth(walk.tiling.rows) * wide() : 0; }
  int64_t pairs_count() const {
    return paired ? Product::depth(walk.tiling.rows) * walk.tiling.columns : 0;
  }
  int64_t thread_space() const {
    return Scratch::space(image_rows_count(), sizeof(Operand)) + 2 * Scratch::space(pairs_count(), sizeof(Operand));
  }
  void take(Scratch& scratch) {
    const Pairs& p = walk.p;
    text_rows = scratch.template take<Operand>(d_image ? text_depth() * wide() : 0);
    image_sum = d_image && !in_place() ? scratch.template take<T>(p.n * p.d) : static_cast<T*>(d_image);
    text_sum = d_text && !in_place() ? scratch.template take<T>(p.m * p.d) : static_cast<T*>(d_text);
  }
  Buffers take_thread(Scratch& scratch) const {
    Operand* image_rows = scratch.template take<Operand>(image_rows_count());
    Operand* by_row = scratch.template take<Operand>(pairs_count());
    return {image_rows, by_row, scratch.template take<Operand>(pairs_count())};
  }

  void pack_text(const Team& team, Operand* row_buffer) const {
    const Pairs& p = walk.p;
    if (d_image)
      Gemm<Product>::pack_rows(p.text, p.dtype, p.text_row, p.m, p.d, text_depth() * team.rank / team.size,
                               text_depth() * (team.rank + 1) / team.size, text_rows, text_depth() * NR, row_buffer);
  }

  void begin_rows(int64_t i0, int64_t rows, const Buffers& own, Operand* row_buffer) const {
    int64_t depth = Product::depth(rows);
    if (d_text)
      Gemm<Product>::pack_rows(walk.image_row(i0), walk.p.dtype, walk.p.image_row, rows, walk.p.d, 0, depth,
                               own.image_rows, depth * NR, row_buffer);
  }

  // `g` is the gradient of the logits with zeros in the padding.
  void add(const Tile& t, const T* g, const Buffers& own, bool first_of_rows, bool first_of_columns) const {
    int64_t d = walk.p.d, depth = Product::depth(t.rows), row_stride = t.stride;
    const Operand *by_row, *by_column;
    if constexpr (paired) {
      if (d_image) Product::pair_columns(g, t.rows, t.stride, own.by_row);
      if (d_text) Product::pair_rows(g, t.rows, t.stride, own.by_column);
      by_row = own.by_row, by_column = own.by_column, row_stride = t.stride / 2;
    } else {
      by_row = by_column = g;
    }
    if (d_image)
      Gemm<Product>::run(t.rows, d, Product::depth(t.width), by_row, row_stride, Fixed<1>{},
                         text_rows + Product::depth(t.j0) * NR, text_depth() * NR, image_sum + t.i0 * d, d,
                         !first_of_rows);
    if (d_text)
      Gemm<Product>::run(t.width, d, depth, by_column, Fixed<1>{}, t.stride, own.image_rows, depth * NR,
                         text_sum + t.j0 * d, d, !first_of_columns);
  }

  // sum_i <image_i, sum_i> before the scale: the gradient of the scale.
  double dot(const Team& team, T* row_buffer) const {
    const Pairs& p = walk.p;
    bool by_rows = d_image != nullptr;
    int64_t lines = by_rows ? p.n : p.m;
    double total = 0;
    for (int64_t i = lines * team.rank / team.size; i < lines * (team.rank + 1) / team.size; ++i) {
      widen_row(by_rows ? walk.image_row(i) : walk.text_row(i), p.dtype, p.d, row_buffer);
      const T* sums = (by_rows ? image_sum : text_sum) + i * p.d;
      double line = 0;
      for (int64_t k = 0; k < p.d; ++k) line += double(row_buffer[k]) * double(sums[k]);
      total += line;
    }
    return total;
  }

  void finish(const Team& team) const {
    const Pairs& p = walk.p;
    auto scaled = [&](const T* sums, void* to, int64_t lines) {
      if (!to) return;
      for (int64_t i = lines * team.rank / team.size; i < lines * (team.rank + 1) / team.size; ++i)
        narrow_row(sums + i * p.d, walk.scale, p.d, dtype, static_cast<char*>(to) + i * p.d * bytes_of(dtype));
    };
    scaled(image_sum, d_image, p.n);
    scaled(text_sum, d_text, p.m);
  }
};

// Runs a kernel class on the product that suits the inputs.
template <template <class> class Kernel, class Call>
int run(const Call& call) {
  if (call.pairs.dtype == DType::float64) return Kernel<Plain<double>>(call).run();
#ifdef __AVX512BF16__
  if (call.pairs.dtype == DType::bfloat16) return Kernel<Bfloat16Pairs>(call).run();
#endif
  return Kernel<Plain<float>>(call).run();
}

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
