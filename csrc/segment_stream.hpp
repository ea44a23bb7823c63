// Cuts a token source into segments, ahead of the compute that consumes them.
//
// One reader thread fills a ring of slots that were allocated once; next() hands out one slot at a time. A full ring
// holds the reader back, an empty one the consumer, so memory is the same number however long the input is.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "polling.hpp"
#include "token_source.hpp"

namespace rmt {

struct StreamOptions {
  size_t segment_size = 0;        // tokens
  size_t first_segment_size = 0;  // tokens; shorter than the others for right alignment
  size_t ring_slots = 8;
  std::optional<int64_t> vocab_size;  // none: ids are not checked
};

// The slots' memory. Segments share it, so that an old view is stale at worst and never dangling.
struct SlotMemory {
  std::vector<int64_t> tokens;          // [ring_slots, segment_size]
  std::atomic<uint64_t> handed_out{0};  // how many segments next() has handed out
  std::atomic<bool> released{true};     // the latest of them was given back
};

struct Segment {
  std::shared_ptr<SlotMemory> memory;
  int64_t* ids = nullptr;  // [size], valid until the following next()
  size_t size = 0;
  uint64_t index = 0;
  uint64_t position = 0;  // tokens before it, after dropping
  bool last = false;      // no token follows

  bool valid() const { return !memory->released && memory->handed_out == index + 1; }
};

struct StreamStats {
  uint64_t segments = 0, tokens = 0;  // handed out
  double reader_wait_seconds = 0;     // the ring was full: compute is the slower side
  double consumer_wait_seconds = 0;   // the ring was empty: the input is the slower side
};

class SegmentStream {
 public:
  SegmentStream(std::shared_ptr<TokenSource> source, const StreamOptions& options);
  ~SegmentStream() { stop(); }  // in the process that made it
  SegmentStream(const SegmentStream&) = delete;
  SegmentStream& operator=(const SegmentStream&) = delete;

  // Gives the previous segment's slot back and waits for the next one; none at the end of the input. Throws what went
  // wrong in the reader (InputError) after the segments before it, and Stopped after stop() or in a forked child.
  std::optional<Segment> next(const Poll& poll);

  // From any thread, any number of times. Wakes whoever waits and ends the reader thread.
  void stop();

  StreamStats stats() const;

 private:
  using Lock = std::unique_lock<std::mutex>;

  void check_process() const;
  void run();
  void read_segments();
  bool half_free() const;
  size_t wait_for_slot();
  void publish(size_t size, bool last);
  size_t fill(int64_t* ids, size_t done, size_t wanted);
  void check_vocabulary(const int64_t* ids, size_t count, uint64_t position) const;
  bool look_ahead(size_t size);
  Segment take();

  const StreamOptions options_;
  const pid_t process_;
  const std::shared_ptr<TokenSource> source_;
  const std::shared_ptr<SlotMemory> memory_;
  std::unique_ptr<TokenReader> reader_;

  // The reader thread's own.
  uint64_t position_ = 0;
  int64_t ahead_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable not_full_, not_empty_;
  std::vector<Segment> slots_;
  uint64_t published_ = 0, taken_ = 0, released_ = 0;  // segments; each count follows the one before it
  bool finished_ = false, stopping_ = false;
  std::exception_ptr error_;
  StreamStats stats_;

  std::mutex join_mutex_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace rmt
