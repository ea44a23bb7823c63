#include "segment_stream.hpp"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

namespace rmt {
namespace {

// A ring is a staging place; one larger than this is a mistake in an argument.
constexpr size_t kMaxRingTokens = size_t{1} << 27;
constexpr size_t kMaxRingSlots = size_t{1} << 16;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

StreamOptions checked(StreamOptions options) {
  if (options.segment_size == 0) throw ArgumentError("segment_size: expected at least 1 token, came 0");
  if (options.ring_slots == 0 || options.ring_slots > kMaxRingSlots) {
    throw ArgumentError("ring_slots: expected 1 to " + std::to_string(kMaxRingSlots) + ", came " +
                        std::to_string(options.ring_slots));
  }
  if (options.segment_size > kMaxRingTokens / options.ring_slots) {
    throw ArgumentError("segment_size=" + std::to_string(options.segment_size) +
                        " times ring_slots=" + std::to_string(options.ring_slots) + " is over " +
                        std::to_string(kMaxRingTokens) + " tokens; use smaller segments or fewer slots");
  }
  if (options.first_segment_size == 0 || options.first_segment_size > options.segment_size) {
    throw ArgumentError("first_segment_size: expected 1 to segment_size=" + std::to_string(options.segment_size) +
                        ", came " + std::to_string(options.first_segment_size));
  }
  if (options.vocab_size && *options.vocab_size <= 0) {
    throw ArgumentError("vocab_size: expected at least 1, came " + std::to_string(*options.vocab_size));
  }
  return options;
}

std::shared_ptr<SlotMemory> allocate(const StreamOptions& options) {
  auto memory = std::make_shared<SlotMemory>();
  memory->tokens.resize(options.segment_size * options.ring_slots);
  return memory;
}

// Ctrl-C belongs to the threads of the caller. What reports a crash of this very thread stays on.
void block_signals() {
  sigset_t signals;
  sigfillset(&signals);
  for (int crash : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&signals, crash);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

}  // namespace

SegmentStream::SegmentStream(std::shared_ptr<TokenSource> source, const StreamOptions& options)
    : options_(checked(options)),
      process_(::getpid()),
      source_(std::move(source)),
      memory_(allocate(options_)),
      reader_(source_->reader()),
      slots_(options_.ring_slots) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    slots_[i].ids = memory_->tokens.data() + i * options_.segment_size;
  }
  thread_ = std::thread(&SegmentStream::run, this);
}

// A fork copies neither the reader thread nor the state of its locks.
void SegmentStream::check_process() const {
  if (::getpid() == process_) return;
  throw Stopped("this stream belongs to the process that made it and does not survive a fork(); make one in the child");
}

std::optional<Segment> SegmentStream::next(const Poll& poll) {
  check_process();
  Lock lock(mutex_);
  released_ = taken_;
  memory_->released = true;
  if (half_free()) not_full_.notify_one();
  const auto ready = [&] { return taken_ < published_ || finished_ || stopping_; };
  if (!ready()) {
    const auto start = Clock::now();
    wait_polling(not_empty_, lock, poll, ready);
    stats_.consumer_wait_seconds += seconds_since(start);
  }
  const bool drained = taken_ == published_;
  if (!drained && !stopping_) return take();
  if (drained && error_) std::rethrow_exception(error_);
  if (drained && finished_) return std::nullopt;
  // Not the end of the input, and it must not look like it.
  throw Stopped(kStoppedEarly);
}

Segment SegmentStream::take() {
  Segment segment = slots_[taken_ % slots_.size()];
  segment.memory = memory_;
  ++taken_;
  memory_->handed_out = taken_;
  memory_->released = false;
  stats_.segments += 1;
  stats_.tokens += segment.size;
  return segment;
}

void SegmentStream::stop() {
  if (::getpid() != process_) return;  // there is no thread to stop, and the lock may be taken for ever
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  not_full_.notify_all();
  not_empty_.notify_all();
  reader_->stop();
  const Lock join(join_mutex_);
  if (thread_.joinable()) thread_.join();
}

StreamStats SegmentStream::stats() const {
  check_process();
  const Lock lock(mutex_);
  return stats_;
}

void SegmentStream::run() {
  block_signals();
  std::exception_ptr error;
  try {
    read_segments();
  } catch (...) {
    error = std::current_exception();
  }
  reader_->stop();  // whoever still pushes must hear that nobody reads
  const Lock lock(mutex_);
  finished_ = true;
  error_ = error;
  not_empty_.notify_all();
}

// A segment is published only when it is known whether a token follows it, so one token is always read ahead.
void SegmentStream::read_segments() {
  size_t wanted = options_.first_segment_size;
  bool more = reader_->read(&ahead_, 1) > 0;
  while (more) {
    int64_t* ids = slots_[wait_for_slot()].ids;
    ids[0] = ahead_;
    check_vocabulary(ids, 1, position_);
    const size_t size = fill(ids, 1, wanted);
    more = size == wanted && look_ahead(size);
    publish(size, !more);
    wanted = options_.segment_size;
  }
}

// If the look-ahead itself fails, the segment before it is whole and must still reach the consumer.
bool SegmentStream::look_ahead(size_t size) {
  try {
    return reader_->read(&ahead_, 1) > 0;
  } catch (...) {
    publish(size, false);
    throw;
  }
}

// A reader that found the ring full sleeps until half of it is free, so that it is not woken for every segment.
bool SegmentStream::half_free() const { return published_ - released_ <= slots_.size() / 2; }

size_t SegmentStream::wait_for_slot() {
  Lock lock(mutex_);
  if (published_ - released_ == slots_.size() && !stopping_) {
    const auto start = Clock::now();
    not_full_.wait(lock, [&] { return half_free() || stopping_; });
    stats_.reader_wait_seconds += seconds_since(start);
  }
  if (stopping_) throw Stopped(kStoppedEarly);
  return published_ % slots_.size();
}

void SegmentStream::publish(size_t size, bool last) {
  const Lock lock(mutex_);
  Segment& slot = slots_[published_ % slots_.size()];
  slot.size = size;
  slot.index = published_;
  slot.position = position_;
  slot.last = last;
  position_ += size;
  ++published_;
  not_empty_.notify_one();
}

// Reads on until `ids` holds `wanted` tokens; `done` of them are there already. Returns how many there are at the end.
size_t SegmentStream::fill(int64_t* ids, size_t done, size_t wanted) {
  while (done < wanted) {
    const size_t came = reader_->read(ids + done, wanted - done);
    if (came == 0) break;
    check_vocabulary(ids + done, came, position_ + done);
    done += came;
  }
  return done;
}

void SegmentStream::check_vocabulary(const int64_t* ids, size_t count, uint64_t position) const {
  if (!options_.vocab_size) return;
  const uint64_t limit = static_cast<uint64_t>(*options_.vocab_size);
  bool bad = false;  // all of them first, without a branch each; negative ids wrap to huge ones
  for (size_t i = 0; i < count; ++i) bad |= static_cast<uint64_t>(ids[i]) >= limit;
  if (!bad) return;
  const size_t at =
      std::find_if(ids, ids + count, [&](int64_t id) { return static_cast<uint64_t>(id) >= limit; }) - ids;
  throw InputError("token " + std::to_string(ids[at]) + " at position " + std::to_string(position + at) +
                   " is outside the vocabulary: expected 0 to " + std::to_string(limit - 1) +
                   "; tokenize the input with this model's tokenizer");
}

}  // namespace rmt
