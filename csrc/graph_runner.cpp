#include "graph_runner.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace rmt {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kAlignment = 64;  // bytes; arrays of a piece share no cache line
constexpr size_t kMaxPinned = size_t{1} << 30;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Bytes of pinned memory that a piece takes.
size_t piece_bytes(const GraphRunnerOptions& options) {
  const size_t n = options.piece_segments;
  size_t bytes = aligned(n * options.segment_size * sizeof(int64_t)) + aligned(n * sizeof(int64_t)) +
                 aligned(sizeof(int64_t)) + aligned(n * sizeof(int32_t));
  for (const GraphOutput& output : options.outputs) bytes += aligned(n * output.bytes);
  return bytes;
}

void check_sizes(const GraphRunnerOptions& options) {
  if (options.segment_size == 0) throw ArgumentError("segment_size: expected at least 1 token, came 0");
  if (options.piece_segments == 0) throw ArgumentError("piece_segments: expected at least 1, came 0");
  size_t row = options.segment_size * sizeof(int64_t);
  for (const GraphOutput& output : options.outputs) row += output.bytes;
  if (options.segment_size > kMaxPinned || row > kMaxPinned / options.piece_segments) {
    throw ArgumentError("piece_segments=" + std::to_string(options.piece_segments) + " of " + std::to_string(row) +
                        " bytes each are over " + std::to_string(kMaxPinned) + " bytes of pinned memory; use fewer");
  }
}

GraphRunnerOptions checked(GraphRunnerOptions options) {
  check_sizes(options);
  auto& graphs = options.graphs;
  std::sort(graphs.begin(), graphs.end(), [](const auto& a, const auto& b) { return a.segments > b.segments; });
  if (graphs.empty() || graphs.back().segments != 1) {
    throw ArgumentError("graphs: expected one that folds a single segment, for what the others leave");
  }
  const auto null = [](const SegmentGraph& graph) { return graph.exec == nullptr; };
  if (std::any_of(graphs.begin(), graphs.end(), null)) throw ArgumentError("graphs: one of them is null");
  return options;
}

}  // namespace

// One thread at a time, in the runner's context, and only while it is whole.
template <class Work>
auto GraphRunner::used(Work work) {
  if (in_use_.exchange(true)) throw ArgumentError("another thread is using this graph runner");
  struct Release {
    std::atomic<bool>& flag;
    ~Release() { flag = false; }
  } const release{in_use_};
  if (!failure_.empty()) throw cuda::CudaError("this graph runner failed before: " + failure_);
  const cuda::CurrentContext current(cuda_, context_);
  return work();
}

// What fails half-way through leaves the device in a place that nobody knows.
template <class Work>
void GraphRunner::on_device(Work work) {
  try {
    work();
  } catch (const std::exception& error) {
    failure_ = error.what();
    throw;
  }
}

GraphRunner::GraphRunner(const cuda::DriverTable& cuda, GraphRunnerOptions options)
    : cuda_(cuda), options_(checked(std::move(options))), held_size_(options_.segment_size), next_size_(held_size_) {
  cuda_(cuda_.get_context, &context_);
  try {
    allocate();
  } catch (...) {
    release();
    throw;
  }
}

GraphRunner::~GraphRunner() { release(); }

void GraphRunner::allocate() {
  cuda_(cuda_.create_stream, &up_, cuda::kStreamNonBlocking);
  cuda_(cuda_.create_stream, &down_, cuda::kStreamNonBlocking);
  cuda_(cuda_.allocate_host, &pinned_, kPieces * piece_bytes(options_), 0u);
  char* at = static_cast<char*>(pinned_);
  for (Piece& piece : pieces_) {
    place_piece(piece, at);
    *piece.place = static_cast<int64_t>((&piece - pieces_.data()) * options_.piece_segments);
    for (cuda::Event* event : {&piece.uploaded, &piece.computed, &piece.downloaded}) {
      cuda_(cuda_.create_event, event, cuda::kEventDisableTiming | cuda::kEventBlockingSync);
    }
  }
}

void GraphRunner::place_piece(Piece& piece, char*& at) {
  const size_t n = options_.piece_segments;
  const auto next = [&](size_t bytes) {
    char* begin = at;
    at += aligned(bytes);
    return begin;
  };
  piece.ids = reinterpret_cast<int64_t*>(next(n * options_.segment_size * sizeof(int64_t)));
  piece.lengths = reinterpret_cast<int64_t*>(next(n * sizeof(int64_t)));
  piece.place = reinterpret_cast<int64_t*>(next(sizeof(int64_t)));
  piece.finite = reinterpret_cast<int32_t*>(next(n * sizeof(int32_t)));
  for (const GraphOutput& output : options_.outputs) {
    piece.output.push_back(reinterpret_cast<uint8_t*>(next(n * output.bytes)));
  }
}

// Pinned memory goes after the copies that use it, whatever failed before; nothing here can tell of an error.
void GraphRunner::release() noexcept {
  cuda::Context before = nullptr;
  cuda_.get_context.function(&before);
  cuda_.set_context.function(context_);
  for (cuda::Stream stream : {up_, down_}) {
    if (stream != nullptr) cuda_.synchronize_stream.function(stream);
  }
  // The counter is uploaded on the caller's stream, and its launches read the rings.
  if (pinned_ != nullptr) cuda_.synchronize_stream.function(options_.compute);
  for (const Piece& piece : pieces_) {
    for (cuda::Event event : {piece.uploaded, piece.computed, piece.downloaded}) {
      if (event != nullptr) cuda_.destroy_event.function(event);
    }
  }
  for (cuda::Stream stream : {up_, down_}) {
    if (stream != nullptr) cuda_.destroy_stream.function(stream);
  }
  if (pinned_ != nullptr) cuda_.free_host.function(pinned_);
  cuda_.set_context.function(before);
}

void GraphRunner::begin(const std::vector<int64_t>& rest, size_t first, size_t size) {
  if (segments_ != 0 || !held_.empty()) throw ArgumentError("begin(): this graph runner has begun before");
  if (size == 0 || size > options_.segment_size || first == 0 || first > size || rest.size() > first) {
    throw ArgumentError("begin(): expected rest of " + std::to_string(rest.size()) +
                        " ≤ first=" + std::to_string(first) + " ≤ size=" + std::to_string(size) +
                        " ≤ segment_size=" + std::to_string(options_.segment_size) + " tokens");
  }
  held_ = rest;
  held_size_ = first;
  next_size_ = size;
}

bool GraphRunner::advance(SegmentStream& stream, size_t limit, const Poll& poll) {
  return used([&] {
    bool more = false;
    try {
      more = read(stream, limit, poll);
    } catch (...) {
      if (failure_.empty()) flush();
      throw;
    }
    flush();
    return more && finite_;
  });
}

// Fills the current piece; false at the end of the stream.
bool GraphRunner::read(SegmentStream& stream, size_t limit, const Poll& poll) {
  Piece& piece = pieces_[current_];
  collect(piece);
  limit = std::min(limit, options_.piece_segments);
  while (finite_ && piece.filled < limit) {
    const auto segment = stream.next(poll);
    if (!segment) return false;
    take(*segment);
  }
  return true;
}

// A full held segment goes into the piece, now that a token follows it.
void GraphRunner::take(const Segment& segment) {
  if (held_.size() == held_size_) {
    fill(pieces_[current_]);
    held_.clear();
    held_size_ = next_size_;
  }
  if (held_.size() + segment.size > held_size_) {
    throw ArgumentError("the stream's segment of " + std::to_string(segment.size) + " tokens does not fit: " +
                        std::to_string(held_size_ - held_.size()) + " were left of a segment");
  }
  held_.insert(held_.end(), segment.ids, segment.ids + segment.size);
}

void GraphRunner::fill(Piece& piece) {
  int64_t* row = piece.ids + piece.filled * options_.segment_size;
  std::copy(held_.begin(), held_.end(), row);
  std::fill(row + held_.size(), row + options_.segment_size, 0);
  piece.lengths[piece.filled] = static_cast<int64_t>(held_.size());
  piece.filled += 1;
  segments_ += 1;
  tokens_ += held_.size();
}

// Queues what the current piece holds.
void GraphRunner::flush() {
  Piece& piece = pieces_[current_];
  if (piece.filled == 0 || piece.in_flight || !finite_) return;
  on_device([&] {
    upload(piece);
    launch(piece.filled);
    download(piece);
  });
  piece.in_flight = true;
  stats_.pieces += 1;
  current_ = (current_ + 1) % kPieces;
}

void GraphRunner::upload(Piece& piece) {
  const size_t row = options_.segment_size * sizeof(int64_t);
  const auto place = static_cast<cuda::DevicePointer>(*piece.place);
  cuda_(cuda_.copy_up, options_.ids + place * row, piece.ids, piece.filled * row, up_);
  cuda_(cuda_.copy_up, options_.lengths + place * sizeof(int64_t), piece.lengths, piece.filled * sizeof(int64_t), up_);
  cuda_(cuda_.record_event, piece.uploaded, up_);
  cuda_(cuda_.wait_event, options_.compute, piece.uploaded, 0u);
  // Launches of the other piece still read the counter, so it moves on their own stream.
  cuda_(cuda_.copy_up, options_.counter, piece.place, sizeof(int64_t), options_.compute);
}

void GraphRunner::launch(size_t segments) {
  for (const SegmentGraph& graph : options_.graphs) {
    for (; segments >= graph.segments; segments -= graph.segments) {
      cuda_(cuda_.launch_graph, graph.exec, options_.compute);
      stats_.launches += 1;
    }
  }
}

void GraphRunner::download(Piece& piece) {
  cuda_(cuda_.record_event, piece.computed, options_.compute);
  cuda_(cuda_.wait_event, down_, piece.computed, 0u);
  const auto place = static_cast<cuda::DevicePointer>(*piece.place);
  cuda_(cuda_.copy_down, piece.finite, options_.finite + place * sizeof(int32_t), piece.filled * sizeof(int32_t),
        down_);
  for (size_t i = 0; i < options_.outputs.size(); ++i) {
    const GraphOutput& output = options_.outputs[i];
    cuda_(cuda_.copy_down, piece.output[i], output.device + place * output.bytes, piece.filled * output.bytes, down_);
  }
  cuda_(cuda_.record_event, piece.downloaded, down_);
}

// Waits for a piece to come back; its memory and its places in the ring are then free.
void GraphRunner::collect(Piece& piece) {
  if (!piece.in_flight || !finite_) return;
  on_device([&] {
    const auto start = Clock::now();
    cuda_(cuda_.synchronize_event, piece.downloaded);
    stats_.wait_seconds += std::chrono::duration<double>(Clock::now() - start).count();
    const int32_t* flags = piece.finite;
    const size_t good = std::find(flags, flags + piece.filled, 0) - flags;
    keep_outputs(piece, good);
    folded_ += good;
    finite_ = good == piece.filled;
    first_bad_ = good;
  });
  if (!finite_) return;  // its ids are asked for
  piece.in_flight = false;
  piece.filled = 0;
}

void GraphRunner::keep_outputs(const Piece& piece, size_t segments) {
  outputs_.resize(options_.outputs.size());
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const uint8_t* begin = piece.output[i];
    outputs_[i].insert(outputs_[i].end(), begin, begin + segments * options_.outputs[i].bytes);
  }
}

void GraphRunner::finish() {
  used([&] {
    for (size_t i = 0; i < kPieces; ++i) {
      collect(pieces_[current_]);
      if (finite_) current_ = (current_ + 1) % kPieces;
    }
  });
}

std::vector<std::vector<int64_t>> GraphRunner::unfolded() const {
  std::vector<std::vector<int64_t>> segments;
  for (size_t i = 0; !finite_ && i < kPieces; ++i) {
    const Piece& piece = pieces_[(current_ + i) % kPieces];
    for (size_t j = i == 0 ? first_bad_ : 0; j < piece.filled; ++j) {
      const int64_t* row = piece.ids + j * options_.segment_size;
      segments.emplace_back(row, row + piece.lengths[j]);
    }
  }
  return segments;
}

std::vector<std::vector<uint8_t>> GraphRunner::take_outputs() {
  outputs_.resize(options_.outputs.size());
  std::vector<std::vector<uint8_t>> taken(options_.outputs.size());
  taken.swap(outputs_);
  return taken;
}

}  // namespace rmt
