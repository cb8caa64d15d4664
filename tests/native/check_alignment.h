// The alignment kernel's part of check_native.cpp: every kind of padding on small odd shapes, the plan in a buffer of
// exactly its size, against the plain formula in double.
#pragma once
#include "../../csrc/cpu/alignment.h"

namespace {

struct IpotCase {
  DType dtype;
  int64_t batch, n, m, k;
  bool lengths, masks;
  int threads;
};

template <class T>
void check_ipot(const IpotCase& c) {
  constexpr int64_t iterations = 6;
  constexpr double beta = 0.5;
  int64_t batch = c.batch, n = c.n, m = c.m;
  Features cost(c.dtype, batch * n, m, 3);
  std::vector<int64_t> lengths_x, lengths_y;
  std::vector<uint8_t> mask_x, mask_y;
  for (int64_t b = 0; c.lengths && b < batch; ++b) {
    lengths_x.push_back(int64_t(generator() % uint64_t(n + 1)));
    lengths_y.push_back(int64_t(generator() % uint64_t(m + 1)));
  }
  for (int64_t i = 0; c.masks && i < batch * n; ++i) mask_x.push_back(generator() % 3 > 0);
  for (int64_t j = 0; c.masks && j < batch * m; ++j) mask_y.push_back(generator() % 3 > 0);
  std::vector<T> plan(size_t(batch * n * m), T(-1));
  Ipot call{cost.bytes.data(), c.dtype, batch, n, m, n * cost.stride, cost.stride,
            c.lengths ? lengths_x.data() : nullptr, c.lengths ? lengths_y.data() : nullptr,
            c.masks ? mask_x.data() : nullptr, c.masks ? mask_y.data() : nullptr, beta, iterations, c.k, plan.data(),
            c.threads};
  expect_close("ipot status", ipot(call), 0, 0);

  for (int64_t b = 0; b < batch; ++b) {
    auto there = [&](int64_t i, int64_t j) {
      return (!c.lengths || (i < lengths_x[size_t(b)] && j < lengths_y[size_t(b)])) &&
             (!c.masks || (mask_x[size_t(b * n + i)] && mask_y[size_t(b * m + j)]));
    };
    std::vector<double> p(size_t(n * m)), q(p), kernel(p), sigma(size_t(n), 0.0), delta(size_t(m), 0.0);
    std::vector<bool> row(size_t(n), false), column(size_t(m), false);
    double rows = 0, columns = 0;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        if (!there(i, j)) continue;
        p[size_t(i * m + j)] = 1, kernel[size_t(i * m + j)] = std::exp(-cost.at(b * n + i, j) / beta);
        if (!row[size_t(i)]) row[size_t(i)] = true, ++rows;
        if (!column[size_t(j)]) column[size_t(j)] = true, ++columns;
      }
    for (int64_t i = 0; i < n; ++i) sigma[size_t(i)] = row[size_t(i)] ? 1 / rows : 0;
    for (int64_t step = 0; step < iterations; ++step) {
      for (size_t e = 0; e < p.size(); ++e) q[e] = kernel[e] * p[e];
      for (int64_t inner = 0; inner < c.k; ++inner) {
        for (int64_t j = 0; j < m; ++j) {
          double mass = 0;
          for (int64_t i = 0; i < n; ++i) mass += q[size_t(i * m + j)] * sigma[size_t(i)];
          delta[size_t(j)] = mass > 0 ? 1 / (columns * mass) : 0;
        }
        for (int64_t i = 0; i < n; ++i) {
          double mass = 0;
          for (int64_t j = 0; j < m; ++j) mass += q[size_t(i * m + j)] * delta[size_t(j)];
          sigma[size_t(i)] = mass > 0 ? 1 / (rows * mass) : 0;
        }
      }
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) p[size_t(i * m + j)] = sigma[size_t(i)] * q[size_t(i * m + j)] * delta[size_t(j)];
    }
    for (int64_t e = 0; e < n * m; ++e)
      expect_close("ipot", double(plan[size_t(b * n * m + e)]), p[size_t(e)], sizeof(T) == 4 ? 1e-6 : 1e-12);
  }
}

void check_alignment_family() {
  struct Shape {
    int64_t batch, n, m;
  };
  for (Shape s : {Shape{1, 1, 1}, {2, 3, 5}, {3, 7, 8}, {2, 9, 17}, {4, 5, 40}, {1, 40, 50}, {2, 4, 67}, {3, 0, 5},
                  {2, 4, 0}, {0, 3, 3}})
    for (int threads : {1, 3})
      for (int64_t k : {1, 2})
        for (int option = 0; option < 4; ++option)
          for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
            IpotCase c{dtype, s.batch, s.n, s.m, k, (option & 1) != 0, (option & 2) != 0, threads};
            if (dtype == DType::float64)
              check_ipot<double>(c);
            else
              check_ipot<float>(c);
          }
  float cost = 0, plan = 0;
  for (int64_t length : {-1, 2}) {
    Ipot call{&cost, DType::float32, 1, 1, 1, 1, 1, &length, nullptr, nullptr, nullptr, 0.5, 1, 1, &plan, 1};
    expect_close("ipot refuses a length", ipot(call), 1, 0);
  }
}

}  // namespace
