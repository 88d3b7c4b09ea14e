// The oneTBB rows of bench_sched.py: prints nanoseconds per task, spawned and submitted, two threads.

#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/task_arena.h>
#include <oneapi/tbb/task_group.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>

static double now_ns() {
  return std::chrono::duration<double, std::nano>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int main() {
  tbb::global_control threads(tbb::global_control::max_allowed_parallelism, 3);
  // Two workers beside this thread, which only submits.
  tbb::task_arena arena(2, 0);
  std::atomic<long> ran{0};

  const int rounds = 2000, children = 200;
  double spawned = 0;
  std::atomic<bool> finished{false};
  arena.enqueue([&] {
    for (int round = -rounds / 10; round < rounds; ++round) {
      if (round == 0) spawned = -now_ns();
      tbb::task_group group;
      for (int i = 0; i < children; ++i) {
        group.run([&] { ran.fetch_add(0, std::memory_order_relaxed); });
      }
      group.wait();
    }
    spawned += now_ns();
    finished = true;
  });
  while (!finished) std::this_thread::sleep_for(std::chrono::microseconds(20));

  const long tasks = 50000;
  double submitted = 0;
  for (int round = 0; round < 5; ++round) {
    ran = 0;
    const double started = now_ns();
    for (long i = 0; i < tasks; ++i) arena.enqueue([&] { ran.fetch_add(1); });
    while (ran < tasks) std::this_thread::sleep_for(std::chrono::microseconds(20));
    const double took = now_ns() - started;
    if (round == 0 || took < submitted) submitted = took;
  }
  std::printf("{\"spawned\": %f, \"submitted\": %f}\n", spawned / rounds / children,
              submitted / tasks);
}
