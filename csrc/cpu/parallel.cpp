#include "parallel.h"

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace vlmfast {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GompNumber = int (*)();

GompParallel gomp_parallel = nullptr;
GompNumber gomp_thread_number = nullptr, gomp_team_size = nullptr;

struct Job {
  void (*body)(void*, const Team&);
  void* data;
  std::atomic<uint32_t> arrived{0};
};

}  // namespace

void use_openmp(uint64_t parallel, uint64_t thread_number, uint64_t team_size) {
  bool whole = parallel && thread_number && team_size;
  gomp_thread_number = whole ? reinterpret_cast<GompNumber>(thread_number) : nullptr;
  gomp_team_size = whole ? reinterpret_cast<GompNumber>(team_size) : nullptr;
  gomp_parallel = whole ? reinterpret_cast<GompParallel>(parallel) : nullptr;
}

bool openmp_in_use() { return gomp_parallel != nullptr; }

// A counter that only grows: barrier number b is passed once b * size threads have arrived.
void Team::barrier() const {
  if (size == 1) return;
  uint32_t mine = arrived->fetch_add(1, std::memory_order_acq_rel) + 1;
  uint32_t goal = (mine + uint32_t(size) - 1) / uint32_t(size) * uint32_t(size);
  for (int spin = 0; int32_t(arrived->load(std::memory_order_acquire) - goal) < 0; ++spin)
    if (spin > 64) std::this_thread::yield();
}

void run_team(int threads, void (*body)(void*, const Team&), void* data) {
  Job job{body, data};
  if (threads <= 1) {
    body(data, Team{0, 1, &job.arrived});
  } else if (gomp_parallel) {
    gomp_parallel(
        [](void* argument) {
          Job& job = *static_cast<Job*>(argument);
          job.body(job.data, Team{gomp_thread_number(), gomp_team_size(), &job.arrived});
        },
        &job, unsigned(threads), 0);
  } else {
    std::vector<std::thread> others;
    for (int rank = 1; rank < threads; ++rank)
      others.emplace_back([&job, rank, threads] { job.body(job.data, Team{rank, threads, &job.arrived}); });
    body(data, Team{0, threads, &job.arrived});
    for (std::thread& other : others) other.join();
  }
}

Scratch::Scratch(int64_t bytes) {
  constexpr int64_t huge = int64_t(1) << 21;
  int64_t alignment = bytes >= 2 * huge ? huge : 64;
  size_ = (bytes + alignment) / alignment * alignment;
  start_ = next_ = static_cast<char*>(std::aligned_alloc(size_t(alignment), size_t(size_)));
  if (!start_) throw std::bad_alloc();
  prefer_huge_pages(start_, size_);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(start_, size_t(size_));
#endif
}

Scratch::~Scratch() {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(start_, size_t(size_));
#endif
  std::free(start_);
}

void prefer_huge_pages(void* start, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  uintptr_t first = (reinterpret_cast<uintptr_t>(start) + huge - 1) / huge * huge;
  uintptr_t last = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / huge * huge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace vlmfast
