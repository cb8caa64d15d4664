// Symmetric InfoNCE (CLIP, Radford et al. 2021, Fig. 3) without the N x M logits in memory.
//
// A tile of logits is one product S = A B^T; its epilogue either adds the tile to the statistics of its rows and
// columns at once, or turns it into the gradient G of the logits, which two more products spread to both towers.
#include "pairs.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

// Log-sum-exp of many lines: reference exponents and sums, in double.
struct Lines {
  double *top, *sum;
  void start(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) top[i] = -std::numeric_limits<double>::infinity(), sum[i] = 0;
  }
};

// Adds sums_i * exp(reference_i) to lines [first, first + count); a stride of 0 gives one reference to all.
template <class T>
void merge(Lines lines, int64_t first, int64_t count, const T* sums, const T* references, int stride) {
  using D = Simd<double>;
  double *top = lines.top + first, *sum = lines.sum + first;
  int64_t i = 0;
  for (; i + D::lanes <= count; i += D::lanes) {
    double extra_lanes[D::lanes], reference_lanes[D::lanes];
    for (int l = 0; l < D::lanes; ++l)
      extra_lanes[l] = double(sums[i + l]), reference_lanes[l] = double(references[(i + l) * stride]);
    Vec<double> old_top = load(top + i), reference = load(reference_lanes), extra = load(extra_lanes);
    Vec<double> new_top = larger(old_top, reference);
    // -inf - -inf: neither side has anything
    Vec<double> base = new_top == -std::numeric_limits<double>::infinity() ? Vec<double>{} : new_top;
    store(sum + i, Vec<double>(load(sum + i) * exp<double>(old_top - base) + extra * exp<double>(reference - base)));
    store(top + i, new_top);
  }
  for (; i < count; ++i) {
    double reference = double(references[i * stride]), new_top = std::max(top[i], reference);
    if (new_top == -std::numeric_limits<double>::infinity()) continue;
    sum[i] = sum[i] * std::exp(top[i] - new_top) + double(sums[i]) * std::exp(reference - new_top);
    top[i] = new_top;
  }
}

template <class Product>
class Forward : Walk<Product> {
  using Base = Walk<Product>;
  using T = typename Product::T;
  using Operand = typename Product::Operand;
  using V = Vec<T>;
  using Base::p, Base::tiling, Base::scale, Base::bias, Base::lanes, Base::minus_infinity, Base::paired;
  const InfoNceForward& call;
  double *row_stats, *column_stats;
  T *kept, *exponents;

  double* row_stat(Statistic which) const { return row_stats + which * p.n; }
  double* column_stat(Statistic which) const { return column_stats + which * p.m; }

 public:
  explicit Forward(const InfoNceForward& c)
      : Base(c.pairs), call(c), row_stats(c.row_stats), column_stats(c.column_stats),
        kept(static_cast<T*>(c.tiles)),
        exponents(kept ? kept + tiling.kept() : nullptr) {}

  int run() {
    if (!this->valid()) return 1;
    int threads = tiling.threads;
    int64_t line = std::max(tiling.rows, tiling.columns);
    int64_t sums_space = 4 * Scratch::space(line, sizeof(T));
    Scratch scratch(Scratch::space(this->packed_count(), sizeof(Operand)) + 4 * Scratch::space(p.n + p.m, 8) +
                    threads * (this->thread_space() + sums_space));
    if (kept) prefer_huge_pages(kept, tiling.kept() * int64_t(sizeof(T)));
    Operand* packed = scratch.template take<Operand>(this->packed_count());
    Lines rows{scratch.template take<double>(p.n), scratch.template take<double>(p.n)};
    Lines columns{scratch.template take<double>(p.m), scratch.template take<double>(p.m)};
    struct Own {
      typename Base::Buffers buffers;
      T *row_sum, *row_top, *column_sum, *column_top;
    };
    Own own[most_threads];
    for (int t = 0; t < threads; ++t) {
      own[t].buffers = this->take(scratch);
      for (T** part : {&own[t].row_sum, &own[t].row_top, &own[t].column_sum, &own[t].column_top})
        *part = scratch.template take<T>(line);
    }
    start(row_stats, p.n);
    start(column_stats, p.m);
    rows.start(0, p.n);
    columns.start(0, p.m);
    parallel(threads, [&](const Team& team) {
      Own& mine = own[team.rank];
      this->pack_text(team, packed, mine.buffers.row);
      team.barrier();
      this->tiles(
          team, [&](int64_t i0, int64_t count) { this->convert_block(i0, count, mine.buffers.image); },
          [&](const Tile& t, bool, bool) {
            T* s = kept ? kept + t.kept_at : mine.buffers.tile;
            this->dot_products(t, mine.buffers.image, packed, s);
            if (paired && kept) s = std::copy_n(s, t.rows * t.stride, mine.buffers.tile) - t.rows * t.stride;
            statistics(t, s, mine.row_sum, mine.row_top, mine.column_sum, mine.column_top, rows, columns);
          });
      finish(team, rows, p.n, row_stat(LSE));
      finish(team, columns, p.m, column_stat(LSE));
    });
    if (call.loss) *static_cast<T*>(call.loss) = T(loss());
    return 0;
  }

 private:
  void start(double* stats, int64_t lines) const {
    std::fill_n(stats, (call.full ? 6 : 2) * lines, 0.0);
    if (call.full) std::fill_n(stats + BEST * lines, lines, -std::numeric_limits<double>::infinity());
  }

  static void finish(const Team& team, Lines lines, int64_t count, double* lse) {
    for (int64_t i = count * team.rank / team.size; i < count * (team.rank + 1) / team.size; ++i)
      lse[i] = lines.top[i] + std::log(lines.sum[i]);
  }

  // Everything except the log-sum-exp, before exclusion; `s` holds logits, the two buffers a line each.
  void other_statistics(const Tile& t, const T* s, T* sums, T* bests) const {
    if (!call.full) {
      if (this->crosses_diagonal(t))
        for (int64_t i = this->first_diagonal(t); i < this->last_diagonal(t); ++i) {
          int64_t j = this->diagonal_column(t, i);
          row_stat(POSITIVE)[t.i0 + i] = column_stat(POSITIVE)[t.j0 + j] = double(s[i * t.stride + j]);
        }
      return;
    }
    if (this->diagonal() && !p.mask) return diagonal_statistics(t, s, sums, bests);
    double *column_positive = column_stat(POSITIVE) + t.j0, *column_positives = column_stat(POSITIVES) + t.j0;
    double *column_best = column_stat(BEST) + t.j0, *column_total = column_stat(SUM) + t.j0;
    double* column_count = column_stat(COUNT) + t.j0;
    for (int64_t i = 0; i < t.rows; ++i) {
      int64_t row = t.i0 + i;
      for (int64_t j = 0; j < t.width; ++j) {
        bool positive = p.labels ? p.labels[row] == p.text_labels[t.j0 + j] : row + p.offset == t.j0 + j;
        if (p.mask && this->masked(t, i, j) && (p.labels || !positive)) continue;
        double x = double(s[i * t.stride + j]);
        row_stat(SUM)[row] += x, row_stat(COUNT)[row] += 1;
        column_total[j] += x, column_count[j] += 1;
        if (positive) {
          row_stat(POSITIVE)[row] += x, row_stat(POSITIVES)[row] += 1;
          column_positive[j] += x, column_positives[j] += 1;
        } else {
          row_stat(BEST)[row] = std::max(row_stat(BEST)[row], x);
          column_best[j] = std::max(column_best[j], x);
        }
      }
    }
  }

  // The same where every pair counts and a row has one positive at most: whole vectors, one column of each left out.
  void diagonal_statistics(const Tile& t, const T* s, T* sums, T* bests) const {
    std::fill_n(sums, t.width, T(0));
    std::fill_n(bests, t.width, minus_infinity);
    for (int64_t i = 0; i < t.rows; ++i) {
      const T* row = s + i * t.stride;
      int64_t at = t.i0 + i, positive = this->diagonal_column(t, i), whole = t.width / lanes * lanes;
      V total{}, top = broadcast(minus_infinity);
      for (int64_t j = 0; j < whole; j += lanes) {
        V x = load(row + j), other = x;
        if (positive >= j && positive < j + lanes) other[positive - j] = minus_infinity;
        total += x;
        top = larger(top, other);
        store(sums + j, V(load(sums + j) + x));
        store(bests + j, larger(load(bests + j), other));
      }
      double sum = double(sum_lanes<T>(total)), best = double(max_lanes<T>(top));
      for (int64_t j = whole; j < t.width; ++j) {
        sum += double(row[j]), sums[j] += row[j];
        if (j == positive) continue;
        best = std::max(best, double(row[j])), bests[j] = std::max(bests[j], row[j]);
      }
      row_stat(SUM)[at] += sum, row_stat(COUNT)[at] += double(t.width);
      row_stat(BEST)[at] = std::max(row_stat(BEST)[at], best);
      if (positive < 0 || positive >= t.width) continue;
      row_stat(POSITIVE)[at] = column_stat(POSITIVE)[t.j0 + positive] = double(row[positive]);
      row_stat(POSITIVES)[at] = column_stat(POSITIVES)[t.j0 + positive] = 1;
    }
    for (int64_t j = 0; j < t.width; ++j) {
      column_stat(SUM)[t.j0 + j] += double(sums[j]), column_stat(COUNT)[t.j0 + j] += double(t.rows);
      column_stat(BEST)[t.j0 + j] = std::max(column_stat(BEST)[t.j0 + j], double(bests[j]));
    }
  }

  void statistics(const Tile& t, T* s, T* row_sum, T* row_top, T* column_sum, T* column_top, Lines rows,
                  Lines columns) const {
    T factor = scale, shift = bias;
    if (call.full || this->needs_exclusion(t)) {
      this->apply_scale(t, s);
      factor = 1, shift = 0;
      other_statistics(t, s, column_sum, column_top);
      this->exclude(t, s);
    }
    Range<T> range = this->range(t, s, factor, shift);
    std::fill_n(column_sum, t.stride, T(0));
    if (this->shares_exponent(range)) {
      // one exp per logit: rows and columns share the tile's largest logit as exponent
      T rest = shift - range.top;
      for (int64_t i = 0; i < t.rows; ++i) {
        V sum{};
        for (int64_t j = 0; j < t.stride; j += lanes) {
          T* at = s + i * t.stride + j;
          V e = exp<T>(V(load(at) * factor + rest));
          store(at, e);
          sum += e;
          store(column_sum + j, V(load(column_sum + j) + e));
        }
        row_sum[i] = sum_lanes<T>(sum);
      }
      merge(rows, t.i0, t.rows, row_sum, &range.top, 0);
      merge(columns, t.j0, t.width, column_sum, &range.top, 0);
      if (exponents) exponents[t.index] = range.top;
      return;
    }
    if (factor != 1 || shift != 0) this->apply_scale(t, s);
    std::fill_n(column_top, t.stride, minus_infinity);
    for (int64_t i = 0; i < t.rows; ++i) {
      V top = broadcast(minus_infinity);
      for (int64_t j = 0; j < t.stride; j += lanes) {
        V x = load(s + i * t.stride + j);
        top = larger(top, x);
        store(column_top + j, larger(load(column_top + j), x));
      }
      row_top[i] = max_lanes<T>(top);
    }
    for (int64_t j = 0; j < t.stride; ++j) column_top[j] = column_top[j] == minus_infinity ? T(0) : column_top[j];
    for (int64_t i = 0; i < t.rows; ++i) {
      V sum{}, top = broadcast(row_top[i] == minus_infinity ? T(0) : row_top[i]);
      for (int64_t j = 0; j < t.stride; j += lanes) {
        V x = load(s + i * t.stride + j);
        sum += exp<T>(V(x - top));
        store(column_sum + j, V(load(column_sum + j) + exp<T>(V(x - load(column_top + j)))));
      }
      row_sum[i] = sum_lanes<T>(sum);
    }
    merge(rows, t.i0, t.rows, row_sum, row_top, 1);
    merge(columns, t.j0, t.width, column_sum, column_top, 1);
    if (exponents) exponents[t.index] = std::numeric_limits<T>::quiet_NaN();
  }

  double line_loss(const double* stats, int64_t lines, int64_t i) const {
    double normaliser = stats[LSE * lines + i], target = stats[POSITIVE * lines + i];
    if (this->diagonal()) {
      if (call.smoothing == 0) return softplus(normaliser - target);
      normaliser = target + softplus(normaliser - target);
    } else {
      double positives = stats[POSITIVES * lines + i];
      if (positives == 0) return 0;
      target /= positives;
    }
    double uniform = call.smoothing == 0 ? 0 : stats[SUM * lines + i] / stats[COUNT * lines + i];
    return normaliser - (1 - call.smoothing) * target - call.smoothing * uniform;
  }

  double loss() const {
    double total = 0;
    double share = call.rows && call.columns ? 0.5 : 1;
    if (call.rows) {
      double sum = 0;
      for (int64_t i = 0; i < p.n; ++i) sum += line_loss(row_stats, p.n, i);
      total += share * sum / double(p.n);
    }
    if (call.columns) {
      double sum = 0;
      for (int64_t j = 0; j < p.m; ++j) sum += line_loss(column_stats, p.m, j);
      total += share * sum / double(p.m);
    }
    return total;
  }
};

template <class Product>
class Backward : Walk<Product> {
  using Base = Walk<Product>;
  using T = typename Product::T;
  using Operand = typename Product::Operand;
  using V = Vec<T>;
  using Base::p, Base::tiling, Base::scale, Base::bias, Base::lanes, Base::minus_infinity, Base::paired;
  const InfoNceBackward& call;
  const T *kept, *exponents;

  // Per line: weight, normaliser of the softmax, share of the smoothed target per pair, share of a labelled positive.
  struct Coefficients {
    T *weight, *uniform, *target;
    double* normaliser;
    const double* stats;
    int64_t lines;
  };

 public:
  explicit Backward(const InfoNceBackward& c)
      : Base(c.pairs), call(c), kept(static_cast<const T*>(c.tiles)),
        exponents(kept ? kept + tiling.kept() : nullptr) {}

  int run() {
    if (!this->valid()) return 1;
    if (p.n == 0 || p.m == 0) return nothing();
    Spread<Product> spread(*this, call.d_image, call.d_text, call.gradient_dtype);
    int threads = tiling.threads;
    int64_t line = std::max(tiling.rows, tiling.columns);
    Scratch scratch(Scratch::space(this->packed_count(), sizeof(Operand)) + 8 * Scratch::space(std::max(p.n, p.m), 8) +
                    spread.shared_space() +
                    threads * (this->thread_space() + spread.thread_space() + 2 * Scratch::space(line, sizeof(T)) +
                               Scratch::space(paired ? tiling.rows * tiling.columns : 0, sizeof(T))));
    Operand* packed = scratch.template take<Operand>(kept ? 0 : this->packed_count());
    Coefficients rows = take_lines(scratch, call.row_stats, p.n);
    Coefficients columns = take_lines(scratch, call.column_stats, p.m);
    spread.take(scratch);
    struct Own {
      typename Base::Buffers buffers;
      typename Spread<Product>::Buffers spread;
      T *alpha, *beta, *dots;
    };
    Own own[most_threads];
    int64_t dots = paired && call.d_scale ? tiling.rows * tiling.columns : 0;
    double dot[most_threads] = {};
    for (int t = 0; t < threads; ++t) {
      own[t].buffers = this->take(scratch);
      own[t].spread = spread.take_thread(scratch);
      own[t].alpha = scratch.template take<T>(line);
      own[t].beta = scratch.template take<T>(line);
      own[t].dots = scratch.template take<T>(dots);
    }
    parallel(threads, [&](const Team& team) {
      Own& mine = own[team.rank];
      if (!kept) this->pack_text(team, packed, mine.buffers.row);
      spread.pack_text(team, mine.buffers.row);
      prepare(team, rows, call.row_weight, call.row_weight_stride);
      prepare(team, columns, call.column_weight, call.column_weight_stride);
      team.barrier();
      this->tiles(
          team,
          [&](int64_t i0, int64_t count) {
            if (!kept) this->convert_block(i0, count, mine.buffers.image);
            spread.begin_rows(i0, count, mine.spread, mine.buffers.row);
          },
          [&](const Tile& t, bool first_of_rows, bool first_of_columns) {
            T* g = mine.buffers.tile;
            if (!kept) {
              this->dot_products(t, mine.buffers.image, packed, g);
              if (dots) std::copy_n(g, t.rows * t.stride, mine.dots);
              from_logits(t, g, rows, columns, mine.alpha, mine.beta);
            } else if (paired || exponents[t.index] != exponents[t.index]) {
              std::copy_n(kept + t.kept_at, t.rows * t.stride, g);
              from_logits(t, g, rows, columns, mine.alpha, mine.beta);
            } else {
              from_exponentials(t, kept + t.kept_at, g, rows, columns, mine.alpha, mine.beta);
            }
            correct(t, g, rows, columns);
            if (dots) dot[team.rank] += dot_product(t, g, kept ? kept + t.kept_at : mine.dots);
            spread.add(t, g, mine.spread, first_of_rows, first_of_columns);
          });
      if (call.d_scale && !paired) {
        dot[team.rank] = spread.dot(team, mine.buffers.numbers);
        team.barrier();
      }
      spread.finish(team);
    });
    if (call.d_scale) {
      double total = 0;
      for (int t = 0; t < threads; ++t) total += dot[t];
      *static_cast<T*>(call.d_scale) = T(total);
    }
    return 0;
  }

 private:
  int nothing() const {
    if (call.d_image) memset(call.d_image, 0, size_t(p.n * p.d * bytes_of(call.gradient_dtype)));
    if (call.d_text) memset(call.d_text, 0, size_t(p.m * p.d * bytes_of(call.gradient_dtype)));
    if (call.d_scale) *static_cast<T*>(call.d_scale) = 0;
    return 0;
  }

  static Coefficients take_lines(Scratch& scratch, const double* stats, int64_t lines) {
    T* parts[3];
    for (T*& part : parts) part = scratch.template take<T>(lines);
    return {parts[0], parts[1], parts[2], scratch.template take<double>(lines), stats, lines};
  }

  void prepare(const Team& team, Coefficients c, const void* weights, int64_t stride) const {
    auto given = static_cast<const T*>(weights);
    for (int64_t i = c.lines * team.rank / team.size; i < c.lines * (team.rank + 1) / team.size; ++i) {
      double lse = c.stats[LSE * c.lines + i], weight = given ? double(given[i * stride]) : 0;
      double normaliser = lse, target = 0;
      if (this->diagonal()) {
        double positive = c.stats[POSITIVE * c.lines + i];
        normaliser = positive + softplus(lse - positive);
      } else if (double positives = c.stats[POSITIVES * c.lines + i]; positives > 0) {
        target = weight * (1 - call.smoothing) / positives;
      } else {
        weight = 0;
      }
      c.weight[i] = T(weight);
      c.normaliser[i] = weight == 0 ? unreachable : normaliser;
      c.uniform[i] = call.smoothing == 0 || weight == 0
                         ? T(0) : T(weight * call.smoothing / c.stats[COUNT * c.lines + i]);
      c.target[i] = T(target);
    }
  }

  // exp(s - r_i) w_i = exp(s - exponent) alpha_i, and likewise beta_j for columns.
  void factors(const Tile& t, T exponent, Coefficients rows, Coefficients columns, T* alpha, T* beta) const {
    auto line = [&](Coefficients c, int64_t first, int64_t count, T* out) {
      // the difference in double: a normaliser rounded to float would shift the whole line's probabilities
      for (int64_t i = 0; i < count; ++i) out[i] = T(double(exponent) - c.normaliser[first + i]);
      int64_t i = 0;
      for (; i + lanes <= count; i += lanes)
        store(out + i, V(load(c.weight + first + i) * exp<T>(load(out + i))));
      for (; i < count; ++i) out[i] = c.weight[first + i] * std::exp(out[i]);
    };
    line(rows, t.i0, t.rows, alpha);
    line(columns, t.j0, t.width, beta);
    std::fill(beta + t.width, beta + t.stride, T(0));
  }

  void from_exponentials(const Tile& t, const T* e, T* g, Coefficients rows, Coefficients columns, T* alpha,
                         T* beta) const {
    factors(t, exponents[t.index], rows, columns, alpha, beta);
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.stride; j += lanes)
        store(g + i * t.stride + j, V(load(e + i * t.stride + j) * (alpha[i] + load(beta + j))));
  }

  // sum_ij g_ij <a_i, b_j>: with bfloat16 operands the scale's gradient is taken before G is rounded.
  double dot_product(const Tile& t, const T* g, const T* dots) const {
    double total = 0;
    for (int64_t i = 0; i < t.rows; ++i) {
      V sum{};
      for (int64_t j = 0; j < t.stride; j += lanes) sum += load(g + i * t.stride + j) * load(dots + i * t.stride + j);
      total += double(sum_lanes<T>(sum));
    }
    return total;
  }

  void from_logits(const Tile& t, T* g, Coefficients rows, Coefficients columns, T* alpha, T* beta) const {
    T factor = scale, shift = bias;
    bool kept_logits = kept && !paired;
    if (kept_logits || this->needs_exclusion(t)) {
      if (!kept_logits) {
        this->apply_scale(t, g);
        this->exclude(t, g);
      }
      factor = 1, shift = 0;
    }
    Range<T> range = this->range(t, g, factor, shift);
    if (this->shares_exponent(range)) {
      factors(t, range.top, rows, columns, alpha, beta);
      T rest = shift - range.top;
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.stride; j += lanes) {
          T* at = g + i * t.stride + j;
          store(at, V(exp<T>(V(load(at) * factor + rest)) * (alpha[i] + load(beta + j))));
        }
      return;
    }
    for (int64_t j = 0; j < t.width; ++j) alpha[j] = T(columns.normaliser[t.j0 + j]);
    std::copy_n(columns.weight + t.j0, t.width, beta);
    std::fill(alpha + t.width, alpha + t.stride, T(0));
    std::fill(beta + t.width, beta + t.stride, T(0));
    for (int64_t i = 0; i < t.rows; ++i) {
      T normaliser = T(rows.normaliser[t.i0 + i]), weight = rows.weight[t.i0 + i];
      for (int64_t j = 0; j < t.stride; j += lanes) {
        T* at = g + i * t.stride + j;
        V x = load(at) * factor + shift;
        store(at, V(exp<T>(V(x - normaliser)) * weight + exp<T>(V(x - load(alpha + j))) * load(beta + j)));
      }
    }
  }

  // Targets: the one-hot is subtracted here, in full precision, before G meets a product.
  void correct(const Tile& t, T* g, Coefficients rows, Coefficients columns) const {
    if (call.smoothing != 0)
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.width; ++j)
          g[i * t.stride + j] -= rows.uniform[t.i0 + i] + columns.uniform[t.j0 + j];
    if (p.labels)
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.width; ++j)
          if (p.labels[t.i0 + i] == p.text_labels[t.j0 + j])
            g[i * t.stride + j] -= rows.target[t.i0 + i] + columns.target[t.j0 + j];
    if (p.mask)
      for (int64_t i = 0; i < t.rows; ++i)
        for (int64_t j = 0; j < t.width; ++j)
          if (this->masked(t, i, j)) g[i * t.stride + j] = 0;
    if (this->crosses_diagonal(t))
      for (int64_t i = this->first_diagonal(t); i < this->last_diagonal(t); ++i) {
        int64_t j = this->diagonal_column(t, i);
        g[i * t.stride + j] = T(diagonal_gradient(rows, t.i0 + i) + diagonal_gradient(columns, t.j0 + j));
      }
  }

  // p_ii - 1 = -sigmoid(lse of the others - s_ii), with the smoothed target's difference added.
  double diagonal_gradient(Coefficients c, int64_t i) const {
    double weight = double(c.weight[i]);
    if (weight == 0) return 0;
    double gap = c.stats[LSE * c.lines + i] - c.stats[POSITIVE * c.lines + i];
    return weight * (call.smoothing - sigmoid(gap)) - double(c.uniform[i]);
  }
};

}  // namespace

int info_nce_fwd(const InfoNceForward& call) {
  return run<Forward>(call);
}

int info_nce_bwd(const InfoNceBackward& call) {
  return run<Backward>(call);
}

}  // namespace vlmfast::VLMFAST_ISA
