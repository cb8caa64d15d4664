// GroupNorm, scale and shift, and SiLU in one op: y = silu(z), z = (x - mean) rstd w (1 + scale) + b (1 + scale) + shift
// (Wu and He 2018, eq. 1-4; Dhariwal and Nichol 2021, sec. 3.1). Both directions visit a group twice, the second time
// out of the cache. Groups are cut into chunks by their size alone, and sums are merged in the order of the chunks, so
// that results do not depend on the number of threads.
#include "group_norm.h"

#include <algorithm>

#include "simd.h"
#include "work.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

constexpr int64_t chunk_size = 4096;    // elements: a chunk and its results stay in the first-level cache
constexpr int64_t kept_size = 1 << 16;  // elements of a group up to which the backward keeps the gradient of z
constexpr int64_t most_rows = 64;       // channels of a chunk

// z = (x - centre) slope + offset of one channel. The centre is the mean rounded to T; the offset makes up for the
// rounding, so that a mean far from zero costs no digits.
template <class T>
struct Line {
  T centre, slope, offset;
};

// `rows` channels from channel `row` of the group, `length` positions from `start`.
struct Chunk {
  int64_t row, rows, start, length;
};

// A group's [rows, spatial] elements, either several whole rows or a part of one to a chunk.
struct Cut {
  int64_t rows, spatial, pieces, rows_each, count;

  Cut(int64_t channels, int64_t positions) : rows(channels), spatial(positions) {
    pieces = std::max<int64_t>(ceil_div(spatial, chunk_size), 1);
    rows_each = std::clamp<int64_t>(chunk_size / std::max<int64_t>(spatial, 1), 1, most_rows);
    count = pieces > 1 ? rows * pieces : ceil_div(rows, rows_each);
  }
  Chunk at(int64_t k) const {
    if (pieces == 1) return {k * rows_each, std::min(rows_each, rows - k * rows_each), 0, spatial};
    int64_t start = k % pieces * chunk_size;
    return {k / pieces, 1, start, std::min(chunk_size, spatial - start)};
  }
};

// visit(i, read) of each vector of a row; read(from, filler) loads it, with the filler behind the row's end. Rows of
// whole vectors have a loop of their own: the copy of a part is a call, around which constants leave their registers.
template <class T, bool whole, class Visit>
inline void each_vector(int64_t count, Visit visit) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) visit(i, [i](const T* from, T) { return load(from + i); });
  if constexpr (!whole)
    if (i < count)
      visit(i, [i, count](const T* from, T filler) {
        T part[lanes];
        std::fill_n(part, lanes, filler);
        memcpy(part, from + i, size_t(count - i) * sizeof(T));
        return load(part);
      });
}

// rows(std::bool_constant) for the rows of a chunk, true where they consist of whole vectors.
template <class T, class Rows>
inline void by_length(int64_t count, Rows rows) {
  if (count % Simd<T>::lanes)
    rows(std::false_type{});
  else
    rows(std::true_type{});
}

template <bool whole, class T>
inline void store_within(T* to, int64_t i, int64_t count, Vec<T> value) {
  if (whole || i + Simd<T>::lanes <= count)
    store(to + i, value);
  else
    memcpy(to + i, &value, size_t(count - i) * sizeof(T));
}

// 1 / (1 + e^-z), and z bounded from below, where sigmoid and silu are 0 to all digits. In float e^-z = 2^n 2^f with
// |f| <= 1/2 and a polynomial for 2^f (relative error 1.6e-8): `exp` would look after results that cannot occur here.
template <class T>
inline Vec<T> sigmoid(Vec<T>& z) {
  if constexpr (sizeof(T) == 8) {
    z = larger(broadcast(-700.0), z);  // in this order a NaN stays
    return 1.0 / (1.0 + exp<double>(-z));
  } else {
    constexpr float round = 0x1.8p23f, log2e = 1.44269504f;
    z = larger(broadcast(-87.0f), z);
    Vec<T> bounded = smaller(z, broadcast(87.0f));
    Vec<T> shifted = round - bounded * log2e, n = shifted - round, f = -n - bounded * log2e;
    Vec<T> value = f * 0x1.41fbbcp-13f + 0x1.5f3e54p-10f;
    value = value * f + 0x1.3b2d4cp-7f;
    value = value * f + 0x1.c6aee8p-5f;
    value = value * f + 0x1.ebfbdcp-3f;
    value = value * f + 0x1.62e430p-1f;
    value = value * f + 1.0f;
    typename Simd<float>::I bits, power;
    memcpy(&power, &shifted, sizeof power);
    memcpy(&bits, &value, sizeof bits);
    bits += power << 23;
    memcpy(&value, &bits, sizeof value);
    return 1.0f / (1.0f + value);
  }
}

// Mean and sum of squared distances from it. The rough mean comes first: distances from it are nearly exact.
template <class T>
void moments(const T* x, int64_t count, double* found) {
  constexpr int64_t lanes = Simd<T>::lanes, step = 4 * lanes;
  Vec<T> sums[4] = {};
  int64_t whole = count / step * step;
  for (int64_t i = 0; i < whole; i += step)
    for (int64_t k = 0; k < 4; ++k) sums[k] += load(x + i + k * lanes);
  T rough = sum_halves<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int64_t i = whole; i < count; ++i) rough += x[i];
  rough /= T(count);
  Vec<T> rest[4] = {}, squares[4] = {};
  for (int64_t i = 0; i < whole; i += step)
    for (int64_t k = 0; k < 4; ++k) {
      Vec<T> distance = load(x + i + k * lanes) - rough;
      rest[k] += distance;
      squares[k] += distance * distance;
    }
  each_vector<T, false>(count - whole, [&](int64_t, auto read) {
    Vec<T> distance = read(x + whole, rough) - rough;
    rest[0] += distance;
    squares[0] += distance * distance;
  });
  double left = sum_halves<T>((rest[0] + rest[1]) + (rest[2] + rest[3]));
  double square = sum_halves<T>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  found[0] = double(rough) + left / double(count);
  found[1] = square - left * left / double(count);
}

// Runs first(group, chunk, slot, rank), finish(group) and second(...) in this order. Where there are groups enough, a
// thread takes whole ones, which stay in its cache; otherwise threads share the chunks of all groups. A slot is a place
// for one group between first and second.
class Schedule {
  int64_t groups_, chunks_;
  int threads_;
  bool shared_;

 public:
  Schedule(int64_t groups, int64_t chunks, int64_t elements, int threads) : groups_(groups), chunks_(chunks) {
    threads_ = threads_for(double(elements) * 8, groups * chunks, threads);
    shared_ = threads_ > 1 && groups < 4 * threads_ && chunks > 1;
  }
  int threads() const { return threads_; }
  int64_t slots() const { return shared_ ? groups_ : threads_; }

  template <class First, class Finish, class Second>
  void run(First first, Finish finish, Second second) const {
    Queue whole(groups_, 1), firsts(groups_ * chunks_, 1), finishes(groups_, 1), seconds(groups_ * chunks_, 1);
    parallel(threads_, [&](const Team& team) {
      if (!shared_) {
        whole.work([&](int64_t g) {
          for (int64_t k = 0; k < chunks_; ++k) first(g, k, team.rank, team.rank);
          finish(g);
          for (int64_t k = 0; k < chunks_; ++k) second(g, k, team.rank, team.rank);
        });
        return;
      }
      firsts.work([&](int64_t i) { first(i / chunks_, i % chunks_, i / chunks_, team.rank); });
      team.barrier();
      finishes.work(finish);
      team.barrier();
      seconds.work([&](int64_t i) { second(i / chunks_, i % chunks_, i / chunks_, team.rank); });
    });
  }
};

template <class T>
class Norm {
  static constexpr DType own = sizeof(T) == 4 ? DType::float32 : DType::float64;
  static constexpr int lanes = Simd<T>::lanes;
  using V = Vec<T>;
  const GroupNorm& call;
  Cut cut;
  Schedule schedule;
  int64_t group_size;

 public:
  explicit Norm(const GroupNorm& c)
      : call(c),
        cut(c.channels / c.groups, c.spatial),
        schedule(c.batch * c.groups, cut.count, c.batch * c.channels * c.spatial, c.threads),
        group_size(cut.rows * cut.spatial) {}

  void forward() const {
    int64_t groups = call.batch * call.groups;
    Scratch scratch(Scratch::space(groups * cut.count * 2, 8) + 2 * buffers_space());
    double* partial = scratch.take<double>(groups * cut.count * 2);
    new_pages(call.out);
    T *x_buffer = take_buffers(scratch), *out_buffer = take_buffers(scratch);
    schedule.run(
        [&](int64_t g, int64_t k, int64_t, int rank) {
          Chunk chunk = cut.at(k);
          const T* x = rows_of(call.x, g, chunk, x_buffer + rank * chunk_size);
          moments(x, chunk.rows * chunk.length, partial + (g * cut.count + k) * 2);
        },
        [&](int64_t g) { merge(g, partial + g * cut.count * 2); },
        [&](int64_t g, int64_t k, int64_t, int rank) {
          Chunk chunk = cut.at(k);
          const T* x = rows_of(call.x, g, chunk, x_buffer + rank * chunk_size);
          T* to = place_for(call.out, g, chunk, out_buffer + rank * chunk_size);
          activate(x, Lines(*this, g, chunk), to);
          put(call.out, g, chunk, to);
        });
  }

  // With gain w (1 + scale), d_z = d_out silu'(z), normalised x' and the means M over a group:
  // d_x = rstd (gain d_z - M[gain d_z] - x' M[gain d_z x']), and the parameters' gradients are sums of d_z and d_z x'.
  void backward(const GroupNormBackward& back) const {
    int64_t groups = call.batch * call.groups, lines = call.batch * call.channels;
    if (back.d_x.at) new_pages(back.d_x);
    bool wanted = back.d_x.at, keeps = wanted && call.silu && group_size <= kept_size;
    int64_t kept_count = keeps ? schedule.slots() * group_size : 0;
    Scratch scratch(Scratch::space(lines * cut.pieces * 2, 8) + Scratch::space(lines * 2, 8) +
                    Scratch::space(groups * 2, 8) + Scratch::space(kept_count, sizeof(T)) + 3 * buffers_space());
    double* partial = scratch.take<double>(lines * cut.pieces * 2);  // sums of d_z and of d_z (x - centre)
    double* sums = scratch.take<double>(lines * 2);                  // of d_z and of d_z x'
    double* means = scratch.take<double>(groups * 2);                // of gain d_z and of gain d_z x'
    T* kept = scratch.take<T>(kept_count);
    T *x_buffer = take_buffers(scratch), *up_buffer = take_buffers(scratch), *out_buffer = take_buffers(scratch);
    auto kept_at = [&](int64_t slot, const Chunk& chunk) {
      return keeps ? kept + slot * group_size + chunk.row * cut.spatial + chunk.start : nullptr;
    };
    schedule.run(
        [&](int64_t g, int64_t k, int64_t slot, int rank) {
          Chunk chunk = cut.at(k);
          const T* x = rows_of(call.x, g, chunk, x_buffer + rank * chunk_size);
          const T* up = rows_of(call.out, g, chunk, up_buffer + rank * chunk_size);
          int64_t at = (g * cut.rows + chunk.row) * cut.pieces + chunk.start / chunk_size;
          row_sums(x, up, Lines(*this, g, chunk), kept_at(slot, chunk), partial + 2 * at);
        },
        [&](int64_t g) { finish(g, partial, sums, means + 2 * g, back); },
        [&](int64_t g, int64_t k, int64_t slot, int rank) {
          if (!wanted) return;
          Chunk chunk = cut.at(k);
          const T* x = rows_of(call.x, g, chunk, x_buffer + rank * chunk_size);
          const T* from = keeps ? kept_at(slot, chunk) : rows_of(call.out, g, chunk, up_buffer + rank * chunk_size);
          T* to = place_for(back.d_x, g, chunk, out_buffer + rank * chunk_size);
          gradients(x, from, Lines(*this, g, chunk), means + 2 * g, !keeps && call.silu, to);
          put(back.d_x, g, chunk, to);
        });
    parameter_gradients(sums, back);
  }

 private:
  int64_t buffers_space() const { return Scratch::space(schedule.threads() * chunk_size, sizeof(T)); }
  T* take_buffers(Scratch& scratch) const { return scratch.take<T>(schedule.threads() * chunk_size); }

  // From this size on the C library takes fresh memory for a result, whose first touch would cost as much as the op.
  void new_pages(const Activations& a) const {
    int64_t bytes = call.batch * call.channels * call.spatial * bytes_of(call.dtype);
    if (bytes >= int64_t(1) << 25) prefer_huge_pages(a.at, bytes);
  }

  char* address(const Activations& a, int64_t g, const Chunk& chunk, int64_t r) const {
    int64_t channel = g % call.groups * cut.rows + chunk.row + r;
    int64_t at = g / call.groups * a.batch + channel * a.channel + chunk.start;
    return static_cast<char*>(a.at) + at * bytes_of(call.dtype);
  }

  // The chunk as T, row behind row: where it lies, or widened to the buffer.
  const T* rows_of(const Activations& a, int64_t g, const Chunk& chunk, T* buffer) const {
    if (call.dtype == own && (chunk.rows == 1 || a.channel == chunk.length))
      return reinterpret_cast<const T*>(address(a, g, chunk, 0));
    for (int64_t r = 0; r < chunk.rows; ++r)
      widen_row(address(a, g, chunk, r), call.dtype, chunk.length, buffer + r * chunk.length);
    return buffer;
  }

  // Results are packed, so the rows of a chunk lie side by side there, too.
  T* place_for(const Activations& a, int64_t g, const Chunk& chunk, T* buffer) const {
    return call.dtype == own ? reinterpret_cast<T*>(address(a, g, chunk, 0)) : buffer;
  }

  void put(const Activations& a, int64_t g, const Chunk& chunk, const T* from) const {
    if (call.dtype != own) narrow_row(from, T(1), chunk.rows * chunk.length, call.dtype, address(a, g, chunk, 0));
  }

  double parameter(const void* values, int64_t at) const { return double(static_cast<const T*>(values)[at]); }

  // 1 + scale
  double scaling(int64_t g, int64_t row) const {
    if (!call.scale) return 1;
    return 1 + parameter(call.scale, g / call.groups * call.scale_batch + g % call.groups * cut.rows + row);
  }

  Line<T> line(int64_t g, int64_t row) const {
    int64_t channel = g % call.groups * cut.rows + row;
    double scaled = scaling(g, row), mean = call.mean[g];
    double slope = parameter(call.weight, channel) * scaled * call.rstd[g];
    double level = parameter(call.bias, channel) * scaled;
    if (call.shift) level += parameter(call.shift, g / call.groups * call.shift_batch + channel);
    T centre = T(mean);
    return {centre, T(slope), T(level + slope * (double(centre) - mean))};
  }

  // Those of a chunk, worked out before its rows, so that the loops over rows keep their constants in registers.
  struct Lines {
    int64_t group, rows, length;
    Line<T> each[most_rows];

    Lines(const Norm& norm, int64_t g, const Chunk& chunk) : group(g), rows(chunk.rows), length(chunk.length) {
      for (int64_t r = 0; r < rows; ++r) each[r] = norm.line(g, chunk.row + r);
    }
  };

  // Chan, Golub and LeVeque 1979, eq. 2.1: the squares of two parts about their common mean.
  void merge(int64_t g, const double* partial) const {
    double mean = 0, squares = 0, count = 0;
    for (int64_t k = 0; k < cut.count; ++k) {
      Chunk chunk = cut.at(k);
      double more = double(chunk.rows * chunk.length), all = count + more, apart = partial[2 * k] - mean;
      mean += apart * (more / all);
      squares += partial[2 * k + 1] + apart * apart * (count * more / all);
      count = all;
    }
    call.mean[g] = mean;
    call.rstd[g] = 1 / std::sqrt(squares / count + call.eps);
  }

  void activate(const T* x, const Lines& lines, T* to) const {
    auto rows = [&](auto whole, auto function) {
      for (int64_t r = 0; r < lines.rows; ++r) {
        Line<T> line = lines.each[r];
        const T* from = x + r * lines.length;
        each_vector<T, whole>(lines.length, [&](int64_t i, auto read) {
          V z = (read(from, line.centre) - line.centre) * line.slope + line.offset;
          store_within<whole>(to + r * lines.length, i, lines.length, function(z));
        });
      }
    };
    by_length<T>(lines.length, [&](auto whole) {
      if (call.silu)
        rows(whole, [](V z) { V s = sigmoid<T>(z); return z * s; });
      else
        rows(whole, [](V z) { return z; });
    });
  }

  // up silu'(z) = up s (1 + z (1 - s)), s = sigmoid(z), of x - centre.
  static V gradient_of_z(V distance, V up, const Line<T>& line) {
    V z = distance * line.slope + line.offset, s = sigmoid<T>(z);  // bounds z
    return up * (s * (T(1) + z * (T(1) - s)));
  }

  // found: [rows, 2] of the sums of d_z and d_z (x - centre); d_z goes to `kept` if there is a place.
  void row_sums(const T* x, const T* up, const Lines& lines, T* kept, double* found) const {
    auto rows = [&](auto whole, auto gradient_of) {
      for (int64_t r = 0; r < lines.rows; ++r) {
        Line<T> line = lines.each[r];
        int64_t start = r * lines.length;
        V total{}, weighted{};
        each_vector<T, whole>(lines.length, [&](int64_t i, auto read) {
          V distance = read(x + start, line.centre) - line.centre;
          V gradient = gradient_of(distance, read(up + start, 0), line, start, i);
          total += gradient;
          weighted += gradient * distance;
        });
        found[2 * r] = sum_halves<T>(total), found[2 * r + 1] = sum_halves<T>(weighted);
      }
    };
    by_length<T>(lines.length, [&](auto whole) {
      if (kept)
        rows(whole, [&](V distance, V up, const Line<T>& line, int64_t start, int64_t i) {
          V gradient = gradient_of_z(distance, up, line);
          store_within<whole>(kept + start, i, lines.length, gradient);
          return gradient;
        });
      else if (call.silu)
        rows(whole, [](V distance, V up, const Line<T>& line, int64_t, int64_t) {
          return gradient_of_z(distance, up, line);
        });
      else
        rows(whole, [](V, V up, const Line<T>&, int64_t, int64_t) { return up; });
    });
  }

  void finish(int64_t g, const double* partial, double* sums, double* means, const GroupNormBackward& back) const {
    double mean = call.mean[g], away = double(T(mean)) - mean, first = 0, second = 0;
    for (int64_t row = 0; row < cut.rows; ++row) {
      int64_t at = g * cut.rows + row, channel = g % call.groups * cut.rows + row;
      double total = 0, weighted = 0;
      for (int64_t piece = at * cut.pieces; piece < (at + 1) * cut.pieces; ++piece)
        total += partial[2 * piece], weighted += partial[2 * piece + 1];
      weighted = (weighted + away * total) * call.rstd[g];
      sums[2 * at] = total, sums[2 * at + 1] = weighted;
      double weight = parameter(call.weight, channel), gain = weight * scaling(g, row);
      first += gain * total, second += gain * weighted;
      if (back.d_scale) static_cast<T*>(back.d_scale)[at] = T(weight * weighted + parameter(call.bias, channel) * total);
      if (back.d_shift) static_cast<T*>(back.d_shift)[at] = T(total);
    }
    means[0] = first / double(group_size), means[1] = second / double(group_size);
  }

  // d_x from d_z, or from d_out where `upstream`.
  void gradients(const T* x, const T* from, const Lines& lines, const double* means, bool upstream, T* to) const {
    double mean = call.mean[lines.group], rstd = call.rstd[lines.group], bend = -rstd * rstd * means[1];
    T tilt = T(bend), level = T(bend * (double(T(mean)) - mean) - rstd * means[0]);
    auto rows = [&](auto whole, auto gradient_of) {
      for (int64_t r = 0; r < lines.rows; ++r) {
        Line<T> line = lines.each[r];
        int64_t start = r * lines.length;
        each_vector<T, whole>(lines.length, [&](int64_t i, auto read) {
          V distance = read(x + start, line.centre) - line.centre;
          V gradient = gradient_of(distance, read(from + start, 0), line);
          store_within<whole>(to + start, i, lines.length, gradient * line.slope + (distance * tilt + level));
        });
      }
    };
    by_length<T>(lines.length, [&](auto whole) {
      if (upstream)
        rows(whole, [](V distance, V up, const Line<T>& line) { return gradient_of_z(distance, up, line); });
      else
        rows(whole, [](V, V gradient, const Line<T>&) { return gradient; });
    });
  }

  void parameter_gradients(const double* sums, const GroupNormBackward& back) const {
    T *d_weight = static_cast<T*>(back.d_weight), *d_bias = static_cast<T*>(back.d_bias);
    const T* scale = static_cast<const T*>(call.scale);
    for (int64_t channel = 0; channel < call.channels; ++channel) {
      double weight = 0, bias = 0;
      for (int64_t b = 0; b < call.batch; ++b) {
        const double* own = sums + 2 * (b * call.channels + channel);
        double scaled = scale ? 1 + double(scale[b * call.scale_batch + channel]) : 1;
        weight += scaled * own[1], bias += scaled * own[0];
      }
      if (d_weight) d_weight[channel] = T(weight);
      if (d_bias) d_bias[channel] = T(bias);
    }
  }
};

}  // namespace

void group_norm_fwd(const GroupNorm& call) {
  if (call.dtype == DType::float64)
    Norm<double>(call).forward();
  else
    Norm<float>(call).forward();
}

void group_norm_bwd(const GroupNormBackward& call) {
  if (call.forward.dtype == DType::float64)
    Norm<double>(call.forward).backward(call);
  else
    Norm<float>(call.forward).backward(call);
}

}  // namespace vlmfast::VLMFAST_ISA
