// Sigmoid loss over all pairs (SigLIP, Zhai et al. 2023, eq. 1). It has no normaliser, so the loss and both towers'
// gradients come out of one visit of every tile.
#include "pairs.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

template <class Product>
class Sigmoid : Walk<Product> {
  using Base = Walk<Product>;
  using T = typename Product::T;
  using Operand = typename Product::Operand;
  using V = Vec<T>;
  using Base::p, Base::tiling, Base::scale, Base::bias, Base::lanes;
  const SigLip& call;

 public:
  explicit Sigmoid(const SigLip& c) : Base(c.pairs), call(c) {}

  int run() {
    if (!this->valid()) return 1;
    bool gradients = call.d_image || call.d_text || call.d_scale;
    T* row_loss = static_cast<T*>(call.row_loss);
    std::fill_n(row_loss, p.n, T(0));
    Spread<Product> spread(*this, call.d_image, call.d_text, call.gradient_dtype);
    int threads = tiling.threads;
    Scratch scratch(Scratch::space(this->packed_count(), sizeof(Operand)) + Scratch::space(p.n, 8) + spread.shared_space() +
                    threads * (this->thread_space() + spread.thread_space()));
    Operand* packed = scratch.template take<Operand>(this->packed_count());
    double* loss = scratch.template take<double>(p.n);
    std::fill_n(loss, p.n, 0.0);
    spread.take(scratch);
    struct Own {
      typename Base::Buffers buffers;
      typename Spread<Product>::Buffers spread;
      double d_scale, d_bias;
    };
    Own own[most_threads];
    for (int t = 0; t < threads; ++t) {
      own[t].buffers = this->take(scratch);
      own[t].spread = spread.take_thread(scratch);
      own[t].d_scale = own[t].d_bias = 0;
    }
    if (p.n == 0 || p.m == 0) {
      if (call.d_image) memset(call.d_image, 0, size_t(p.n * p.d * bytes_of(call.gradient_dtype)));
      if (call.d_text) memset(call.d_text, 0, size_t(p.m * p.d * bytes_of(call.gradient_dtype)));
      threads = 0;
    } else {
      parallel(threads, [&](const Team& team) {
        Own& mine = own[team.rank];
        this->pack_text(team, packed, mine.buffers.row);
        spread.pack_text(team, mine.buffers.row);
        team.barrier();
        this->tiles(
            team,
            [&](int64_t i0, int64_t count) {
              this->convert_block(i0, count, mine.buffers.image);
              spread.begin_rows(i0, count, mine.spread, mine.buffers.row);
            },
            [&](const Tile& t, bool first_of_rows, bool first_of_columns) {
              T* s = mine.buffers.tile;
              this->dot_products(t, mine.buffers.image, packed, s);
              epilogue(t, s, loss, gradients, mine.d_scale, mine.d_bias);
              if (gradients) spread.add(t, s, mine.spread, first_of_rows, first_of_columns);
            });
        if (gradients) spread.finish(team);
      });
    }
    for (int64_t i = 0; i < p.n; ++i) row_loss[i] = T(loss[i]);
    double d_scale = 0, d_bias = 0;
    for (int t = 0; t < threads; ++t) d_scale += own[t].d_scale, d_bias += own[t].d_bias;
    if (call.d_scale) *static_cast<T*>(call.d_scale) = T(d_scale);
    if (call.d_bias) *static_cast<T*>(call.d_bias) = T(d_bias);
    return 0;
  }

 private:
  // A negative pair has loss softplus(s) and G = w sigmoid(s), and one exp(-|s|) serves both; the positive pair of a
  // row, softplus(-s) and G = -w sigmoid(-s), is kept out of the sums until the end.
  void epilogue(const Tile& t, T* s, double* loss, bool gradients, double& d_scale, double& d_bias) const {
    auto weights = static_cast<const T*>(call.row_weight);
    bool crossing = this->crosses_diagonal(t);
    for (int64_t i = 0; i < t.rows; ++i) {
      T* row = s + i * t.stride;
      T weight = gradients ? weights[(t.i0 + i) * call.row_weight_stride] : T(0);
      int64_t j = crossing ? this->diagonal_column(t, i) : -1;
      if (j < 0 || j >= t.width) j = -1;
      V sum{}, g_sum{}, g_dot{};
      double row_sum = 0, row_g = 0, row_dot = 0;
      int64_t whole = t.width / lanes * lanes;
      T positive = j < 0 ? T(0) : row[j];
      auto step = [&](V x, V& g, V& loss_of) {
        V z = x * scale + bias;
        V e = exp<T>(z < T(0) ? z : V(-z));
        loss_of = larger(z, V{}) + log1p_unit<T>(e);
        g = weight * (z < T(0) ? e : broadcast(T(1))) / (e + T(1));
      };
      V g, losses;
      for (int64_t at = 0; at < whole; at += lanes) {
        V x = load(row + at);
        step(x, g, losses);
        if (j >= at && j < at + lanes) losses[j - at] = 0, g[j - at] = 0;
        sum += losses;
        if (gradients) {
          store(row + at, g);
          g_sum += g;
          g_dot += g * x;
        }
      }
      for (int64_t at = whole; at < t.width; ++at) {
        T x = row[at];
        step(broadcast(x), g, losses);
        if (j == at) continue;
        row_sum += double(losses[0]);
        if (gradients) {
          row[at] = g[0];
          row_g += double(g[0]);
          row_dot += double(g[0]) * double(x);
        }
      }
      row_sum += double(sum_lanes<T>(sum));
      row_g += double(sum_lanes<T>(g_sum));
      row_dot += double(sum_lanes<T>(g_dot));
      if (j >= 0) {
        double z = double(positive) * double(scale) + double(bias);
        row_sum += softplus(-z);
        if (gradients) {
          double gradient = -double(weight) * sigmoid(-z);
          row[j] = T(gradient);
          row_g += gradient;
          row_dot += gradient * double(positive);
        }
      }
      loss[t.i0 + i] += row_sum;
      d_bias += row_g;
      d_scale += row_dot;
    }
  }
};

}  // namespace

int siglip(const SigLip& call) { return run<Sigmoid>(call); }

}  // namespace vlmfast::VLMFAST_ISA
