// Waiting that a caller can interrupt: how Ctrl-C reaches a thread that sleeps inside the extension.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>

namespace rmt {

// Called now and then from long calls, never with a lock held; it ends the call by throwing.
using Poll = std::function<void()>;

inline constexpr std::chrono::milliseconds kPollInterval{100};

// Opens a lock for a while, and closes it again even when what happens meanwhile throws.
class Unlocked {
 public:
  explicit Unlocked(std::unique_lock<std::mutex>& lock) : lock_(lock) { lock_.unlock(); }
  ~Unlocked() { lock_.lock(); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  std::unique_lock<std::mutex>& lock_;
};

template <class Ready>
void wait_polling(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, const Poll& poll, Ready ready) {
  while (!changed.wait_for(lock, kPollInterval, ready)) {
    if (!poll) continue;
    Unlocked open(lock);
    poll();
  }
}

}  // namespace rmt
