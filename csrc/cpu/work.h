// How kernels share out pieces of work among threads.
#pragma once
#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace vlmfast::VLMFAST_ISA {
namespace {

constexpr int most_threads = 64;

// Hands out the numbers 0 .. count - 1, `few` at a time, to whichever thread is free.
class Queue {
  std::atomic<int64_t> next_{0};
  int64_t count_, few_;

 public:
  Queue(int64_t count, int64_t few) : count_(count), few_(few) {}
  template <class Visit>
  void work(Visit visit) {
    for (int64_t at; (at = next_.fetch_add(few_, std::memory_order_relaxed)) < count_;)
      for (int64_t i = at; i < std::min(at + few_, count_); ++i) visit(i);
  }
};

inline int threads_for(double work, int64_t pieces, int threads) {
  int64_t wanted = std::min<int64_t>({threads, most_threads, int64_t(work / 1e6) + 1, pieces});
  return int(std::max<int64_t>(wanted, 1));
}

}  // namespace
}  // namespace vlmfast::VLMFAST_ISA
