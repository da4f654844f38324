// The threads of a decoding step: woken once for all of it, meeting between its phases, asleep when there is nothing
// to do for long.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace octavo {

// A number that others wait to see change: some tries, then sleep. If whom one waits for was put aside by the system for
// another process, a core that only tries looks busy; one asleep is where the other can go on.
class Signal {
 public:
  uint32_t now() const { return value_.load(std::memory_order_acquire); }
  void change() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    std::lock_guard<std::mutex> held(mutex_);
    changed_.notify_all();
  }
  // How long it slept.
  std::chrono::nanoseconds wait(uint32_t seen, int tries) {
    for (int i = 0; i < tries; ++i) {
      if (now() != seen) return {};
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    const auto began = std::chrono::steady_clock::now();
    std::unique_lock<std::mutex> held(mutex_);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    changed_.wait(held, [&] { return value_.load(std::memory_order_seq_cst) != seen; });
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    return std::chrono::steady_clock::now() - began;
  }

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A fixed number of threads, the caller's being one of them.
class Team {
 public:
  explicit Team(int n) : n_(n) {
    for (int id = 1; id < n; ++id) threads_.emplace_back([this, id] { work(id); });
  }
  ~Team() {
    job_ = nullptr;
    start_.change();
    for (std::thread& thread : threads_) thread.join();
  }
  int size() const { return n_; }
  // Calls job(i) for i < n, each on a thread of its own. One call at a time.
  void run(const std::function<void(int)>& job) {
    job_ = &job;
    if (n_ > 1) start_.change();
    job(0);
    meet();
  }
  // Every member waits for every other.
  void meet() {
    if (n_ == 1) return;
    const uint32_t seen = met_.now();
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == n_) {
      arrived_.store(0, std::memory_order_relaxed);
      met_.change();
    } else {
      const int shy = shy_.load(std::memory_order_relaxed);
      if (shy > 0) shy_.store(shy - 1, std::memory_order_relaxed);
      if (met_.wait(seen, shy > 0 ? kFew : kMany) > kLong) shy_.store(kShy, std::memory_order_relaxed);
    }
  }

 private:
  void work(int id) {
    for (uint32_t seen = 0;; ++seen) {
      start_.wait(seen, 1000);
      if (job_ == nullptr) return;
      (*job_)(id);
      meet();
    }
  }

  // Members that all run meet within microseconds, and waking one that slept takes longer than that: it is worth trying
  // for long. Where a wait was so long that the other must have been put aside, the next ones give way soon.
  static constexpr int kMany = 4000, kFew = 300, kShy = 200;
  static constexpr std::chrono::microseconds kLong{200};

  const int n_;
  std::atomic<int> shy_{0};
  const std::function<void(int)>* job_ = nullptr;
  Signal start_, met_;
  std::atomic<int> arrived_{0};
  std::vector<std::thread> threads_;
};

// Runs job(team, i) for i < n on this process's team: one step at a time, whoever asks. A child of fork() has none of
// its parent's threads (and may have inherited a locked mutex), so it starts with nothing.
inline void on_team(int n, const std::function<void(Team&, int)>& job) {
  struct Process {
    long id;
    std::mutex one_at_a_time;
    std::unique_ptr<Team> team;
  };
  static std::atomic<Process*> current{nullptr};  // never destroyed: its threads sleep until the process ends
#if defined(__unix__) || defined(__APPLE__)
  const long id = long(getpid());
#else
  const long id = 1;
#endif
  Process* own = current.load();
  if (own == nullptr || own->id != id) {
    auto* made = new Process{id, {}, {}};
    if (current.compare_exchange_strong(own, made))
      own = made;
    else
      delete made;
  }
  std::lock_guard<std::mutex> held(own->one_at_a_time);
  if (!own->team || own->team->size() != n) {
    own->team.reset();
    own->team = std::make_unique<Team>(n);
  }
  Team& team = *own->team;
  team.run([&](int member) { job(team, member); });
}

}  // namespace octavo
