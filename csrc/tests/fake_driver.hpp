// A driver whose streams are queues: what is queued runs as late as it may, or at random, and any call can be made to
// fail. Host memory is read when a copy runs, so that a piece that was filled too early shows as wrong ids.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../cuda_driver.hpp"
#include "check.hpp"

namespace fake {

using namespace rmt::cuda;

enum class Pace { kLate, kRandom };

struct Operation {
  std::function<bool()> ready;
  std::function<void()> run;
};

struct Queue {
  std::deque<Operation> operations;
};

struct Mark {  // an event: how often it was recorded, and how many of these have happened
  uint64_t recorded = 0, happened = 0;
};

struct Driver {
  Pace pace = Pace::kLate;
  std::mt19937 random{1};
  size_t calls = 0, fail_at = SIZE_MAX;  // of the calls that may fail, counted from 0
  Result failure = 700;
  const char* failed = nullptr;             // the name of the call that was made to fail
  std::function<void(size_t)> before_call;  // for stopping at any moment
  std::vector<std::string> log;
  std::set<Queue*> streams;
  std::set<Mark*> events;
  std::map<void*, size_t> pinned;
  Queue compute;
  std::function<void(GraphExec)> launch;  // what a graph does when it runs
  Context context = reinterpret_cast<Context>(16);

  bool clean() const { return streams.empty() && events.empty() && pinned.empty(); }

  bool step(Queue& queue) {
    if (queue.operations.empty() || !queue.operations.front().ready()) return false;
    auto operation = std::move(queue.operations.front());
    queue.operations.pop_front();
    operation.run();
    return true;
  }

  std::vector<Queue*> queues() {
    std::vector<Queue*> all{&compute};
    all.insert(all.end(), streams.begin(), streams.end());
    return all;
  }

  // Runs queued work in any order that its streams and events allow, until `done`.
  template <class Done>
  void run_until(Done done) {
    while (!done()) {
      auto all = queues();
      std::shuffle(all.begin(), all.end(), random);
      bool moved = false;
      for (Queue* queue : all) moved = moved || step(*queue);
      if (!moved) check::fail(__FILE__, __LINE__, "the host waits for what can never happen");
    }
  }

  void some_progress() {
    if (pace != Pace::kRandom) return;
    const auto all = queues();
    for (size_t n = random() % 4; n > 0; --n) step(*all[random() % all.size()]);
  }
};

inline Driver* driver = nullptr;

// A fresh driver for the length of a test.
struct Installed : Driver {
  Installed() { driver = this; }
  ~Installed() { driver = nullptr; }
};

// Logs a call and runs it, unless it is the one that has to fail.
template <class Work>
Result call(const char* name, const std::string& what, Work work) {
  if (driver->before_call) driver->before_call(driver->calls);
  driver->some_progress();
  driver->log.push_back(what);
  if (driver->calls++ == driver->fail_at) {
    driver->failed = name;
    return driver->failure;
  }
  work();
  return kSuccess;
}

inline Queue& queue_of(Stream stream) {
  return stream == nullptr ? driver->compute : *reinterpret_cast<Queue*>(stream);
}

inline void enqueue(Stream stream, std::function<void()> run, std::function<bool()> ready = [] { return true; }) {
  queue_of(stream).operations.push_back({std::move(ready), std::move(run)});
}

// Streams are told apart in the log by the order in which they were made: up, down; compute is the caller's.
inline std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}

inline std::string name_of(const void* handle) { return handle == nullptr ? "compute" : names()[handle]; }

inline Result describe_name(Result result, const char** text) {
  *text = result == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_ILLEGAL_ADDRESS";
  return kSuccess;
}

inline Result describe(Result, const char** text) {
  *text = "as the test asked";
  return kSuccess;
}

template <class Handle, class Object>
Result create(const char* name, Handle* handle, std::set<Object*>& all, const std::string& label) {
  return call(name, std::string("create ") + label, [&] {
    auto* made = new Object;
    all.insert(made);
    names()[made] = label;
    *handle = reinterpret_cast<Handle>(made);
  });
}

template <class Object, class Handle>
Result destroy(Handle handle, std::set<Object*>& all) {
  auto* object = reinterpret_cast<Object*>(handle);
  CHECK(all.erase(object) == 1);
  delete object;
  return kSuccess;
}

inline DriverTable table() {
  DriverTable t;
  t.get_error_name.function = describe_name;
  t.get_error_string.function = describe;
  t.get_context.function = [](Context* context) {
    return call("cuCtxGetCurrent", "get context", [&] { *context = driver->context; });
  };
  t.set_context.function = [](Context context) {
    return call("cuCtxSetCurrent", "set context", [&] { driver->context = context; });
  };
  t.allocate_host.function = [](void** memory, size_t bytes, unsigned) {
    return call("cuMemHostAlloc", "allocate", [&] {
      *memory = std::malloc(bytes);
      std::memset(*memory, 0x5a, bytes);
      driver->pinned[*memory] = bytes;
    });
  };
  t.free_host.function = [](void* memory) {
    // No copy may still want it.
    for (Queue* queue : driver->queues()) CHECK(queue->operations.empty());
    CHECK(driver->pinned.erase(memory) == 1);
    std::free(memory);
    return kSuccess;
  };
  t.create_stream.function = [](Stream* stream, unsigned flags) {
    CHECK(flags == kStreamNonBlocking);
    return create("cuStreamCreate", stream, driver->streams, driver->streams.empty() ? "up" : "down");
  };
  t.destroy_stream.function = [](Stream stream) { return destroy<Queue>(stream, driver->streams); };
  t.create_event.function = [](Event* event, unsigned flags) {
    CHECK(flags == (kEventDisableTiming | kEventBlockingSync));
    const char* kinds[] = {"uploaded", "computed", "downloaded"};
    const size_t n = driver->events.size();
    return create("cuEventCreate", event, driver->events, std::string(kinds[n % 3]) + "AB"[n / 3]);
  };
  t.destroy_event.function = [](Event event) { return destroy<Mark>(event, driver->events); };
  t.synchronize_stream.function = [](Stream stream) {
    driver->run_until([&] { return queue_of(stream).operations.empty(); });
    return kSuccess;
  };
  t.record_event.function = [](Event event, Stream stream) {
    return call("cuEventRecord", "record " + name_of(event) + " on " + name_of(stream), [&] {
      auto* mark = reinterpret_cast<Mark*>(event);
      const uint64_t turn = ++mark->recorded;
      enqueue(stream, [mark, turn] { mark->happened = turn; });
    });
  };
  t.wait_event.function = [](Stream stream, Event event, unsigned flags) {
    CHECK(flags == 0);
    return call("cuStreamWaitEvent", name_of(stream) + " waits for " + name_of(event), [&] {
      auto* mark = reinterpret_cast<Mark*>(event);
      const uint64_t turn = mark->recorded;
      enqueue(stream, [] {}, [mark, turn] { return mark->happened >= turn; });
    });
  };
  t.synchronize_event.function = [](Event event) {
    return call("cuEventSynchronize", "host waits for " + name_of(event), [&] {
      auto* mark = reinterpret_cast<Mark*>(event);
      driver->run_until([&] { return mark->happened >= mark->recorded; });
    });
  };
  t.copy_up.function = [](DevicePointer to, const void* from, size_t bytes, Stream stream) {
    return call("cuMemcpyHtoDAsync_v2", "copy " + std::to_string(bytes) + " up on " + name_of(stream),
                [&] { enqueue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); }); });
  };
  t.copy_down.function = [](void* to, DevicePointer from, size_t bytes, Stream stream) {
    return call("cuMemcpyDtoHAsync_v2", "copy " + std::to_string(bytes) + " down on " + name_of(stream),
                [&] { enqueue(stream, [=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); }); });
  };
  t.launch_graph.function = [](GraphExec graph, Stream stream) {
    const auto segments = std::to_string(reinterpret_cast<size_t>(graph));
    return call("cuGraphLaunch", "launch " + segments + " on " + name_of(stream),
                [&] { enqueue(stream, [graph] { driver->launch(graph); }); });
  };
  return t;
}

}  // namespace fake
