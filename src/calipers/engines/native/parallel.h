// Work on as many threads as torch uses: its own, where its OpenMP is that of GCC or one that
// answers to the same names. Threads beside them would have to share the cores with torch's, which
// keep spinning for a while after every operation.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <thread>
#include <vector>

template <typename Work>
static void on_team(void* data) {
  static auto number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
  static auto size = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
  auto& [work, parts] = *static_cast<std::pair<Work&, int64_t>*>(data);
  // A team may be smaller than what was asked for.
  for (int64_t part = number(); part < parts; part += size()) work(part);
}

// Call work(part, first, last) for parts of the blocks. What is computed for a block must not depend
// on the parts: results are then the same with any number of threads.
template <typename Work>
static void in_parallel(int64_t blocks, int64_t parts, Work do_blocks) {
  auto work = [&](int64_t part) {
    do_blocks(part, blocks * part / parts, blocks * (part + 1) / parts);
  };
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
#ifdef OWN_THREADS
  static Parallel parallel = nullptr;
#else
  static auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
  static bool has_team = parallel && dlsym(RTLD_DEFAULT, "omp_get_thread_num") &&
                         dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  if (parts <= 1) {
    work(0);
  } else if (has_team) {
    std::pair<decltype(work)&, int64_t> data(work, parts);
    parallel(on_team<decltype(work)>, &data, unsigned(parts), 0);
  } else {
    std::vector<std::thread> threads;
    for (int64_t part = 1; part < parts; part++) threads.emplace_back(work, part);
    work(0);
    for (auto& thread : threads) thread.join();
  }
}
