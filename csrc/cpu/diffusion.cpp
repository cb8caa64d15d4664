// Steps of Gaussian diffusion: everything between a model's output and the next sample in one pass (Ho et al. 2020;
// Song et al. 2021), and the training loss (Nichol and Dhariwal 2021). What depends on the step alone comes from a table.
#include "diffusion.h"

#include "philox_lanes.h"
#include "tiles.h"
#include "work.h"

#include <cmath>
#include <vector>

namespace vlmfast::VLMFAST_ISA {
namespace {

using namespace cpu;

constexpr int64_t step_columns = 12, loss_columns = 8;
constexpr int64_t chunk = 2048;  // elements of a piece of work; the pieces do not depend on the threads

// Draws of reference/diffusion.py: blocks of 64 elements take the four words of 16 counters.
template <class T>
class Normal {
  using Words = typename PhiloxLanes<T>::Words;
  static constexpr int64_t lanes = Simd<T>::lanes, block = 64, counters = 16;
  static constexpr uint32_t stream = 0x64696666u;
  uint64_t seed_;
  uint32_t row_, offset_;

  static void pair(Words first, Words second, T* cosine, T* sine) {
    Vec<T> radius = root<T>(exponential<T>(first) * T(2)), c, s;
    turn<T>((__builtin_convertvector((typename PhiloxLanes<T>::Signed)second, Vec<T>) + T(0.5)) * T(0x1p-32), c, s);
    store(cosine, Vec<T>(radius * c)), store(sine, Vec<T>(radius * s));
  }

 public:
  Normal(uint64_t seed, uint64_t row, uint64_t offset) : seed_(seed), row_(uint32_t(row)), offset_(uint32_t(offset)) {}
  // Elements [from, from + count) of the row, from a multiple of 64; whole blocks are written.
  void draw(int64_t from, int64_t count, T* to) const {
    constexpr int64_t step = std::min(lanes, counters);
    uint32_t ascending[lanes];
    for (int64_t l = 0; l < lanes; ++l) ascending[l] = uint32_t(l);
    Words rise;
    memcpy(&rise, ascending, sizeof rise);
    for (int64_t e = 0; e < count; e += block)
      for (int64_t l = 0; l < counters; l += step) {
        uint32_t quad = uint32_t((from + e) / block * counters + l);
        Words words[4] = {rise + quad, Words{} + row_, Words{} + offset_, Words{} + stream};
        PhiloxLanes<T>::draw(seed_, words);
        T* at = to + e + l;
        pair(words[0], words[1], at, at + counters);
        pair(words[2], words[3], at + 2 * counters, at + 3 * counters);
      }
  }
};

// A run of `count` elements as T: where they lie, or widened into `buffer`, zeros up to the next whole vector.
template <class T>
const T* read_run(const void* start, DType dtype, int64_t at, int64_t count, T* buffer) {
  constexpr int64_t lanes = Simd<T>::lanes;
  const char* from = static_cast<const char*>(start) + at * bytes_of(dtype);
  if (dtype == Plain<T>::stored && count % lanes == 0) return reinterpret_cast<const T*>(from);
  widen_row(from, dtype, count, buffer);
  for (int64_t i = count; i < round_up(count, lanes); ++i) buffer[i] = 0;
  return buffer;
}

template <class T>
T* write_run(void* start, DType dtype, int64_t at, int64_t count, T* buffer) {
  bool whole = dtype == Plain<T>::stored && count % Simd<T>::lanes == 0;
  return whole ? static_cast<T*>(start) + at : buffer;
}

template <class T>
void finish_run(void* start, DType dtype, int64_t at, int64_t count, const T* buffer) {
  char* to = static_cast<char*>(start) + at * bytes_of(dtype);
  if (reinterpret_cast<const char*>(buffer) != to) narrow_row(buffer, T(1), count, dtype, to);
}

template <class T>
class Step {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes;
  static constexpr DType plain = Plain<T>::stored;
  const Denoise& c;
  int64_t size, pieces_a_row;

 public:
  static constexpr int buffers = 13;

  explicit Step(const Denoise& call)
      : c(call), size(call.channels * call.inner), pieces_a_row(ceil_div(size, chunk)) {}
  int64_t pieces() const { return c.batch * pieces_a_row; }

  void piece(int64_t index, T* const* own) const {
    int64_t b = index / pieces_a_row, e0 = index % pieces_a_row * chunk, count = std::min(chunk, size - e0);
    const double* row = c.table + (c.t ? c.t[b] : c.step) * step_columns;
    T at[step_columns];
    for (int64_t i = 0; i < step_columns; ++i) at[i] = T(row[i]);
    auto [x0_x, x0_o, from_x0, from_x, from_o, log_variance, log_slope, noisy, shift_x0, shift_mean, e_x, e_o] = at;
    int64_t here = b * size + e0;
    auto dense = [&](const void* start, T* buffer) { return read_run<T>(start, plain, here, count, buffer); };
    const T* x = read_run<T>(c.x.at, c.x.dtype, b * c.x.batch + e0, count, own[0]);
    const T *given = nullptr, *without = nullptr, *spread = nullptr, *earlier[3] = {};
    if (c.out.at) {
      given = read_run<T>(c.out.at, c.out.dtype, b * c.out.batch + e0, count, own[1]);
      if (c.guided) without = read_run<T>(c.out.at, c.out.dtype, (c.batch + b) * c.out.batch + e0, count, own[2]);
      if (c.learned) spread = read_run<T>(c.out.at, c.out.dtype, b * c.out.batch + size + e0, count, own[3]);
    }
    for (int k = 0; k < 3; ++k)
      if (c.history[k]) earlier[k] = dense(c.history[k], own[4 + k]);
    const T* mask = c.mask ? masked(b, e0, count, own[7]) : nullptr;
    const T* image = c.mask ? dense(c.image, own[8]) : nullptr;
    const T* shift = c.shift ? dense(c.shift, own[9]) : nullptr;
    const T* noise = nullptr;
    if (noisy != 0 && c.noise) noise = dense(c.noise, own[10]);
    if (noisy != 0 && c.draws) {
      Normal<T>(c.seed, uint64_t(b), c.offset).draw(e0, count, own[10]);
      noise = own[10];
    }
    T* to[3] = {};
    for (int k = 0; k < 3; ++k)
      if (c.found[k]) to[k] = write_run<T>(c.found[k], c.x.dtype, here, count, own[10 + k]);

    T scale = T(c.guidance_scale), bound = c.threshold ? static_cast<const T*>(c.threshold)[b] : T(c.clamp);
    bool combined = c.weights[0] != 0, bounded = bound != std::numeric_limits<T>::infinity() || c.threshold;
    T fixed = std::exp(log_variance / 2);
    for (int64_t i = 0; i < count; i += lanes) {
      V xs = load(x + i), o{};
      if (given) o = load(given + i);
      if (without) {
        V u = load(without + i);
        o = u + scale * (o - u);
      }
      V noise_seen = e_x * xs + e_o * o;
      if (combined) {
        o = T(c.weights[0]) * noise_seen;
        for (int k = 0; k < 3; ++k)
          if (earlier[k]) o += T(c.weights[k + 1]) * load(earlier[k] + i);
      }
      V x0 = x0_x * xs + x0_o * o;
      if (mask) {
        V m = load(mask + i);
        x0 = x0 * (T(1) - m) + load(image + i) * m;
      }
      // NaN stays NaN
      if (bounded) x0 = smaller(broadcast(bound), larger(broadcast(-bound), x0));
      if (c.threshold) x0 /= bound;
      V deviation = broadcast(fixed);
      if (spread) deviation = exp<T>((log_variance + log_slope * load(spread + i)) / T(2));
      V g{};
      if (shift) g = load(shift + i), x0 += shift_x0 * g;
      V then = from_x0 * x0 + from_x * xs + from_o * o;
      if (shift) then += shift_mean * deviation * deviation * g;
      if (noise) then += noisy * deviation * load(noise + i);
      if (to[0]) store(to[0] + i, then);
      if (to[1]) store(to[1] + i, x0);
      if (to[2]) store(to[2] + i, noise_seen);
    }
    for (int k = 0; k < 3; ++k)
      if (to[k]) finish_run<T>(c.found[k], c.x.dtype, here, count, to[k]);
  }

 private:
  const T* masked(int64_t b, int64_t e0, int64_t count, T* buffer) const {
    const T* start = static_cast<const T*>(c.mask) + b * c.mask_batch;
    if (c.mask_channel) return read_run<T>(start, plain, e0, count, buffer);
    for (int64_t i = 0; i < round_up(count, lanes); ++i) buffer[i] = i < count ? start[(e0 + i) % c.inner] : T(0);
    return buffer;
  }
};

template <class T>
struct Workspace {
  Scratch scratch;
  std::vector<T*> at;
  Workspace(int threads, int each)
      : scratch(int64_t(threads) * each * Scratch::space(chunk, sizeof(T))) {
    for (int i = 0; i < threads * each; ++i) at.push_back(scratch.take<T>(chunk));
  }
};

template <class T>
void denoise(const Denoise& c) {
  Step<T> kernel(c);
  double work = double(c.batch * c.channels) * double(c.inner) * 24;
  int threads = threads_for(work, kernel.pieces(), c.threads);
  Workspace<T> space(threads, Step<T>::buffers);
  Queue queue(kernel.pieces(), 1);
  parallel(threads, [&](const Team& team) {
    queue.work([&](int64_t at) { kernel.piece(at, &space.at[size_t(team.rank * Step<T>::buffers)]); });
  });
}

constexpr double bits = 1.4426950408889634;

// log P of half a grey level around x under a Gaussian through tanh's approximation of its integral, and its gradient
// with respect to the log-variance.
inline double log_mass(double x, double centred, double log_variance, double& slope) {
  constexpr double root_2_pi = 0.7978845608028654, cubic = 0.044715, least = 1e-12;
  double inverse = std::exp(-log_variance / 2), at[2], mass[2], gain[2];
  for (int k = 0; k < 2; ++k) {
    at[k] = inverse * (centred + (k ? -1.0 : 1.0) / 255);
    double square = at[k] * at[k], bend = std::tanh(root_2_pi * at[k] * (1 + cubic * square));
    mass[k] = (1 + bend) / 2;
    // d mass / d log-variance: at scales with exp(-log_variance / 2)
    gain[k] = -at[k] / 2 * (1 - bend * bend) / 2 * root_2_pi * (1 + 3 * cubic * square);
  }
  double p = mass[0] - mass[1], d = gain[0] - gain[1];
  if (x < -0.999) p = mass[0], d = gain[0];
  if (x > 0.999) p = 1 - mass[1], d = -gain[1];
  slope = p < least ? 0 : d / p;
  return std::log(std::max(p, least));
}

template <class T>
class Loss {
  using V = Vec<T>;
  static constexpr int64_t lanes = Simd<T>::lanes;
  const DiffusionLoss& c;
  int64_t size, pieces_a_row, channels_out;

  struct Row {
    T target_noise, target_x0, error, spread, spread_slope, decoder, floor, first;
  };
  struct Run {
    Row row;
    const T *out, *variance, *noise, *x0;
    int64_t b, e0, count;
  };

 public:
  static constexpr int buffers = 6;

  explicit Loss(const DiffusionLoss& call)
      : c(call), size(call.channels * call.inner), pieces_a_row(ceil_div(size, chunk)),
        channels_out(call.learned ? 2 : 1) {}
  int64_t pieces() const { return c.batch * pieces_a_row; }
  int64_t row_pieces() const { return pieces_a_row; }

  void sums(int64_t index, T* const* own, double* to) const {
    Run r = run(index, own);
    V squares{}, bounds{};
    double first_bound = 0;
    for (int64_t i = 0; i < r.count; i += lanes) {
      V d = distance(r, i);
      squares += d * d;
      if (!r.variance || r.row.first != 0) continue;
      V u = r.row.spread + r.row.spread_slope * load(r.variance + i);
      V each = (u - T(1) + exp<T>(-u) * (T(1) + r.row.error * d * d)) / T(2);
      bounds += keep(each, r.count - i);
    }
    if (r.variance && r.row.first != 0)
      for (int64_t i = 0; i < r.count; ++i) first_bound -= likelihood(r, i).first;
    // d is 0 beyond the end, since everything read there is
    to[0] = double(sum_lanes<T>(squares));
    to[1] = (double(sum_lanes<T>(bounds)) + first_bound) * bits;
  }

  void gradient(int64_t index, T* const* own) const {
    Run r = run(index, own);
    T per = T(1) / T(size), d_square = static_cast<const T*>(c.squared)[r.b] * per * 2;
    T d_bound = static_cast<const T*>(c.bound)[r.b] * per * T(bits);
    int64_t at = r.b * channels_out * size + r.e0;
    T* d_out = write_run<T>(c.d_out, c.out.dtype, at, r.count, own[4]);
    T* d_variance = nullptr;
    if (r.variance) d_variance = write_run<T>(c.d_out, c.out.dtype, at + size, r.count, own[5]);
    for (int64_t i = 0; i < r.count; i += lanes) {
      V d = distance(r, i);
      store(d_out + i, V(d_square * d));
      if (!d_variance || r.row.first != 0) continue;
      V u = r.row.spread + r.row.spread_slope * load(r.variance + i);
      V each = (T(1) - exp<T>(-u) * (T(1) + r.row.error * d * d)) / T(2);
      store(d_variance + i, V(d_bound * r.row.spread_slope * each));
    }
    if (d_variance && r.row.first != 0)
      for (int64_t i = 0; i < r.count; ++i)
        d_variance[i] = T(-double(d_bound) * double(r.row.spread_slope) * likelihood(r, i).second);
    finish_run<T>(c.d_out, c.out.dtype, at, r.count, d_out);
    if (d_variance) finish_run<T>(c.d_out, c.out.dtype, at + size, r.count, d_variance);
  }

 private:
  Run run(int64_t index, T* const* own) const {
    int64_t b = index / pieces_a_row, e0 = index % pieces_a_row * chunk, count = std::min(chunk, size - e0);
    const double* at = c.table + (c.t ? c.t[b] : c.step) * loss_columns;
    Run r{{T(at[0]), T(at[1]), T(at[2]), T(at[3]), T(at[4]), T(at[5]), T(at[6]), T(at[7])}, nullptr, nullptr, nullptr,
          nullptr, b, e0, count};
    r.out = read_run<T>(c.out.at, c.out.dtype, b * c.out.batch + e0, count, own[0]);
    if (c.learned) r.variance = read_run<T>(c.out.at, c.out.dtype, b * c.out.batch + size + e0, count, own[1]);
    r.noise = read_run<T>(c.noise.at, c.noise.dtype, b * c.noise.batch + e0, count, own[2]);
    r.x0 = read_run<T>(c.x0.at, c.x0.dtype, b * c.x0.batch + e0, count, own[3]);
    return r;
  }
  static V distance(const Run& r, int64_t i) {
    V target{};
    // what has no weight is not looked at
    if (r.row.target_noise != 0) target += r.row.target_noise * load(r.noise + i);
    if (r.row.target_x0 != 0) target += r.row.target_x0 * load(r.x0 + i);
    return load(r.out + i) - target;
  }
  static V keep(V value, int64_t count) {
    for (int64_t l = count; l < lanes; ++l) value[l] = 0;
    return value;
  }
  // (log-likelihood, its gradient with respect to the log-variance)
  std::pair<double, double> likelihood(const Run& r, int64_t i) const {
    double target = double(r.row.target_noise) * double(r.noise[i]) + double(r.row.target_x0) * double(r.x0[i]);
    double d = double(r.out[i]) - target, slope;
    double u = double(r.row.spread) + double(r.row.spread_slope) * double(r.variance[i]);
    double found = log_mass(double(r.x0[i]), double(r.row.decoder) * d, u + double(r.row.floor), slope);
    return {found, slope};
  }
};

template <class T>
void loss(const DiffusionLoss& c, bool backward) {
  Loss<T> kernel(c);
  int64_t size = c.channels * c.inner;
  double work = double(c.batch) * double(size) * 24;
  int threads = threads_for(work, kernel.pieces(), c.threads);
  Workspace<T> space(threads, Loss<T>::buffers);
  std::vector<double> sums(backward ? 0 : size_t(2 * kernel.pieces()));
  Queue queue(kernel.pieces(), 1);
  parallel(threads, [&](const Team& team) {
    T* const* own = &space.at[size_t(team.rank * Loss<T>::buffers)];
    queue.work([&](int64_t at) { backward ? kernel.gradient(at, own) : kernel.sums(at, own, &sums[size_t(2 * at)]); });
  });
  if (backward) return;
  for (int64_t b = 0; b < c.batch; ++b) {
    double squared = 0, bound = 0;
    for (int64_t i = b * kernel.row_pieces(); i < (b + 1) * kernel.row_pieces(); ++i)
      squared += sums[size_t(2 * i)], bound += sums[size_t(2 * i + 1)];
    static_cast<T*>(c.squared)[b] = T(squared / double(size));
    static_cast<T*>(c.bound)[b] = T(bound / double(size));
  }
}

}  // namespace

void denoise_step(const Denoise& call) {
  if (call.x.dtype == DType::float64)
    denoise<double>(call);
  else
    denoise<float>(call);
}

void diffusion_loss(const DiffusionLoss& call) {
  if (call.out.dtype == DType::float64)
    loss<double>(call, false);
  else
    loss<float>(call, false);
}

void diffusion_loss_bwd(const DiffusionLoss& call) {
  if (call.out.dtype == DType::float64)
    loss<double>(call, true);
  else
    loss<float>(call, true);
}

}  // namespace vlmfast::VLMFAST_ISA
