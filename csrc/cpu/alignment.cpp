// Optimal transport by inexact proximal points (IPOT, Xie et al. 2018, alg. 1). All arithmetic is in double: the plan is
// about the 50th power of the kernel, so that its small entries leave float's range, and slow subnormals with it.
#include "alignment.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

using V = Vec<double>;
constexpr int lanes = Simd<double>::lanes;
constexpr double tiny = std::numeric_limits<double>::min();

typedef double Two __attribute__((vector_size(16)));
inline double sum_tree(Two v) { return v[0] + v[1]; }

#if VLMFAST_VECTOR_BYTES >= 32
typedef double Four __attribute__((vector_size(32)));
inline double sum_tree(Four v) {
  Two halves[2];
  memcpy(halves, &v, sizeof v);
  return sum_tree(halves[0] + halves[1]);
}
#endif

#if VLMFAST_VECTOR_BYTES >= 64
inline double sum_tree(V v) {
  Four halves[2];
  memcpy(halves, &v, sizeof v);
  return sum_tree(halves[0] + halves[1]);
}
#endif

// A line whose kernel has vanished gets no mass instead of an infinite factor.
inline double inverse(double mass, double count) { return mass >= tiny ? 1 / (count * mass) : 0; }
inline V inverse(V mass, double count) { return mass >= tiny ? 1 / (count * mass) : V{}; }

struct Buffers {
  double *kernel, *plan;  // [n, width]
  double *delta, *mass;   // [width], of the columns
  double* row;            // [M]
  int64_t *rows, *columns;
};

class Transport {
  const Ipot& call;

 public:
  explicit Transport(const Ipot& c) : call(c) {}

  int run() const {
    for (int64_t b = 0; b < call.batch; ++b)
      if (outside(call.lengths_x, b, call.n) || outside(call.lengths_y, b, call.m)) return 1;
    int threads = int(std::min<int64_t>(call.threads, call.batch));
    if (threads < 1) return 0;
    int64_t width = round_up(call.m, lanes), matrix = Scratch::space(call.n * width, 8);
    int64_t one = 2 * matrix + 2 * Scratch::space(width, 8) + 2 * Scratch::space(call.m, 8) + Scratch::space(call.n, 8);
    Scratch scratch(threads * one);
    std::vector<Buffers> buffers;
    for (int t = 0; t < threads; ++t)
      buffers.push_back({scratch.take<double>(call.n * width), scratch.take<double>(call.n * width),
                         scratch.take<double>(width), scratch.take<double>(width), scratch.take<double>(call.m),
                         scratch.take<int64_t>(call.n), scratch.take<int64_t>(call.m)});
    std::atomic<int64_t> next{0};
    parallel(threads, [&](const Team& team) {
      for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < call.batch;)
        if (call.dtype == DType::float64)
          solve<double>(b, buffers[size_t(team.rank)]);
        else
          solve<float>(b, buffers[size_t(team.rank)]);
    });
    return 0;
  }

 private:
  static bool outside(const int64_t* lengths, int64_t b, int64_t most) {
    return lengths && (lengths[b] < 0 || lengths[b] > most);
  }

  static int64_t kept(const int64_t* lengths, const uint8_t* mask, int64_t b, int64_t size, int64_t* index) {
    int64_t count = 0, end = lengths ? lengths[b] : size;
    for (int64_t i = 0; i < end; ++i)
      if (!mask || mask[b * size + i]) index[count++] = i;
    return count;
  }

  template <class Out>
  void solve(int64_t b, const Buffers& own) const {
    Out* plan = static_cast<Out*>(call.plan) + b * call.n * call.m;
    std::fill_n(plan, call.n * call.m, Out(0));
    int64_t n = kept(call.lengths_x, call.mask_x, b, call.n, own.rows);
    int64_t m = kept(call.lengths_y, call.mask_y, b, call.m, own.columns);
    if (n == 0 || m == 0) return;
    int64_t vectors = ceil_div(m, lanes);
    read(b, n, m, vectors * lanes, own);
    iterate(n, m, vectors, own);
    for (int64_t i = 0; i < n; ++i) {
      Out* to = plan + own.rows[i] * call.m;
      const double* from = own.plan + i * vectors * lanes;
      for (int64_t j = 0; j < m; ++j) to[own.columns[j]] = Out(from[j]);
    }
  }

  // kernel = exp((least - cost) / beta) of the rows and columns that exist, 0 behind them. A constant added to the cost
  // cancels in the plan; the least one as zero keeps the kernel from vanishing.
  void read(int64_t b, int64_t n, int64_t m, int64_t width, const Buffers& own) const {
    double least = std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      int64_t start = b * call.cost_batch + own.rows[i] * call.cost_row;
      widen_row(static_cast<const char*>(call.cost) + start * bytes_of(call.dtype), call.dtype, call.m, own.row);
      double* to = own.kernel + i * width;
      for (int64_t j = 0; j < m; ++j) {
        to[j] = own.row[own.columns[j]];
        least = to[j] < least ? to[j] : least;
      }
      for (int64_t j = m; j < width; ++j) to[j] = std::numeric_limits<double>::infinity();
    }
    if (std::isinf(least)) least = 0;
    for (int64_t at = 0; at < n * width; at += lanes)
      store(own.kernel + at, exp<double>((least - load(own.kernel + at)) / call.beta));
  }

  // Up to eight vectors a row, the state of the columns stays in registers.
  void iterate(int64_t n, int64_t m, int64_t vectors, const Buffers& own) const {
    switch (vectors) {
      case 1: return sweep<1>(n, m, vectors, own);
      case 2: return sweep<2>(n, m, vectors, own);
      case 3: return sweep<3>(n, m, vectors, own);
      case 4: return sweep<4>(n, m, vectors, own);
      case 5: return sweep<5>(n, m, vectors, own);
      case 6: return sweep<6>(n, m, vectors, own);
      case 7: return sweep<7>(n, m, vectors, own);
      case 8: return sweep<8>(n, m, vectors, own);
      default: return sweep<0>(n, m, vectors, own);
    }
  }

  // Q = kernel * P, delta = 1 / (m (sigma Q)), sigma = 1 / (n (Q delta)), P = sigma Q delta. A row's next Q needs only
  // its own sigma and the delta of all columns, so one visit of each row does the second half of one step and the first
  // half of the next: Q's column masses under sigma. `fixed` is the number of vectors a row, 0 if only known here.
  template <int fixed>
  void sweep(int64_t n, int64_t m, int64_t vectors, const Buffers& own) const {
    if constexpr (fixed > 0) vectors = fixed;
    V delta_registers[fixed > 0 ? fixed : 1], mass_registers[fixed > 0 ? fixed : 1];
    auto in = [](const double* from, const V* registers, int64_t v) {
      return fixed > 0 ? registers[v] : load(from + v * lanes);
    };
    auto out = [](double* to, V* registers, int64_t v, V value) {
      if constexpr (fixed > 0)
        registers[v] = value, (void)to;
      else
        store(to + v * lanes, value), (void)registers;
    };
    int64_t width = vectors * lanes;
    memcpy(own.plan, own.kernel, size_t(n * width) * sizeof(double));
    for (int64_t v = 0; v < vectors; ++v) {
      V sum{};
      for (int64_t i = 0; i < n; ++i) sum += load(own.kernel + i * width + v * lanes);
      out(own.mass, mass_registers, v, sum / double(n));
    }
    for (int64_t step = 0, steps = call.iterations * call.k; step < steps; ++step) {
      for (int64_t v = 0; v < vectors; ++v) {
        out(own.delta, delta_registers, v, inverse(in(own.mass, mass_registers, v), double(m)));
        out(own.mass, mass_registers, v, V{});
      }
      bool moves = (step + 1) % call.k == 0, last = step + 1 == steps;
      for (int64_t i = 0; i < n; ++i) {
        double *q = own.plan + i * width, *kernel = own.kernel + i * width;
        V sum{};
        for (int64_t v = 0; v < vectors; ++v) sum += load(q + v * lanes) * in(own.delta, delta_registers, v);
        double sigma = inverse(sum_tree(sum), double(n));
        for (int64_t v = 0; v < vectors; ++v) {
          V value = load(q + v * lanes);
          if (moves) {
            value = value * in(own.delta, delta_registers, v) * sigma;
            if (!last) value *= load(kernel + v * lanes);
            store(q + v * lanes, value);
          }
          out(own.mass, mass_registers, v, in(own.mass, mass_registers, v) + value * sigma);
        }
      }
    }
  }
};

}  // namespace

int ipot(const Ipot& call) { return Transport(call).run(); }

}  // namespace vlmfast::VLMFAST_ISA
