// Threads for kernels. The team runs on the OpenMP runtime that the process already has (PyTorch's, whose address the
// Python side passes in), so that one thread pool serves both; without it, on plain threads.
#pragma once
#include <atomic>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace vlmfast {

struct Team {
  int rank, size;
  std::atomic<uint32_t>* arrived;
  void barrier() const;
};

// Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; zeros go back to plain threads.
void use_openmp(uint64_t parallel, uint64_t thread_number, uint64_t team_size);
bool openmp_in_use();

// Runs body(data, team) on `threads` threads, or on fewer where the runtime grants fewer (team.size says).
void run_team(int threads, void (*body)(void*, const Team&), void* data);

template <class Body>
void parallel(int threads, Body&& body) {
  run_team(threads, [](void* data, const Team& team) { (*static_cast<std::remove_reference_t<Body>*>(data))(team); },
           &body);
}

// Uninitialised memory for one call, aligned for vectors; large pieces ask for huge pages. Throws std::bad_alloc.
// Under the address sanitizer the gaps between the pieces are poisoned.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    char* at = next_;
    next_ += space(count, sizeof(T));
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(at, size_t(count) * sizeof(T));
#endif
    return reinterpret_cast<T*>(at);
  }
  static int64_t space(int64_t count, int64_t size) {
#ifdef __SANITIZE_ADDRESS__
    constexpr int64_t gap = 64;
#else
    constexpr int64_t gap = 0;
#endif
    return (count * size + 63) / 64 * 64 + gap;
  }

 private:
  char *start_, *next_;
  int64_t size_;
};

// Asks for huge pages under memory that somebody else allocated and nobody has touched.
void prefer_huge_pages(void* start, int64_t bytes);

}  // namespace vlmfast
