// The blocking half of the scheduler: what its threads sleep on. See docs/scheduler-protocol.md.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

namespace speechrnt_park {

// A binary semaphore that outlives all its users, with one waiter.
class Semaphore {
 public:
  void post() {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      posted_ = true;
    }
    // Without the mutex, so that the woken thread does not run into it.
    condition_.notify_one();
  }

  void wait() {
    std::unique_lock<std::mutex> hold(mutex_);
    condition_.wait(hold, [this] { return posted_; });
    posted_ = false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
  bool posted_ = false;
};

// A mutex whose holders may wait for each other's changes. Notifying needs the mutex: who sees the
// change under the mutex may then destroy the monitor.
class Monitor {
 public:
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }
  void notify_all() { condition_.notify_all(); }

  // Waits with the mutex held before and after; false when `seconds` have passed first.
  // A negative time is unlimited.
  bool wait(double seconds) {
    std::unique_lock<std::mutex> hold(mutex_, std::adopt_lock);
    bool notified = true;
    if (seconds < 0) {
      condition_.wait(hold);
    } else {
      const std::chrono::duration<double> timeout(seconds);
      notified = condition_.wait_for(hold, timeout) == std::cv_status::no_timeout;
    }
    hold.release();
    return notified;
  }

 private:
  std::mutex mutex_;
  std::condition_variable condition_;
};

}  // namespace speechrnt_park
