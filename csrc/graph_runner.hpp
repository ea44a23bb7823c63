// Streams segments through captured CUDA graphs: no Python and no host wait per segment.
//
// Ids go up in pieces of many segments. On the device they lie in a ring of two pieces; a graph folds the segments from
// the ring's place `counter` on and moves the counter itself, so that launches need no arguments:
//
//    host       fill A   fill B        fill A            fill B          waits only for the piece it fills next
//    copy up       A        B             A                 B            after the host saw the piece come back
//    compute         A A A A  B B B B B B B  A A A A ...                 a launch folds several segments
//    copy down              A             B                              finite?, and what else was asked for
//
// The segment taken last is held back: only a token after it shows that it is folded whole, as in `Stream`.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "polling.hpp"
#include "segment_stream.hpp"

namespace rmt {

// A captured graph that folds `segments` segments from the counter's place on.
struct SegmentGraph {
  cuda::GraphExec exec = nullptr;
  size_t segments = 1;
};

// Written by the graphs for every segment: an array [places, bytes] on the device.
struct GraphOutput {
  cuda::DevicePointer device = 0;
  size_t bytes = 0;
};

// Device memory is the caller's. places = kPieces · piece_segments.
struct GraphRunnerOptions {
  std::vector<SegmentGraph> graphs;  // one of them folds a single segment
  size_t segment_size = 0;
  size_t piece_segments = 0;
  cuda::DevicePointer ids = 0;      // int64 [places, segment_size], zero behind a short segment
  cuda::DevicePointer lengths = 0;  // int64 [places]
  cuda::DevicePointer counter = 0;  // int64: the place of the next segment
  cuda::DevicePointer finite = 0;   // int32 [places]: 0 from the segments on that made the memory not finite
  std::vector<GraphOutput> outputs;
  cuda::Stream compute = nullptr;
};

struct GraphRunnerStats {
  uint64_t pieces = 0, launches = 0;
  double wait_seconds = 0;  // the host waited for the device: compute is the slower side
};

class GraphRunner {
 public:
  static constexpr size_t kPieces = 2;

  // In the context that is current. Throws ArgumentError, CudaError.
  GraphRunner(const cuda::DriverTable& cuda, GraphRunnerOptions options);
  ~GraphRunner();
  GraphRunner(const GraphRunner&) = delete;
  GraphRunner& operator=(const GraphRunner&) = delete;

  // Before the first advance(): the rest that a stream goes on from, held back as if it had been taken. `first`: tokens
  // of the segment that it begins; `size`: of every other one, at most segment_size.
  void begin(const std::vector<int64_t>& rest, size_t first, size_t size);

  // Takes segments and queues those that are whole, at most `limit` and at most a piece of them; false at the end of
  // the stream, and when a memory was not finite. What `stream` throws comes after the segments before it are queued.
  // When a call of the driver or a graph fails, the runner is of no more use.
  bool advance(SegmentStream& stream, size_t limit, const Poll& poll);

  // Waits for everything that was queued.
  void finish();

  // Whether it is of no more use.
  bool failed() const { return !failure_.empty(); }

  // Segments and tokens queued since the beginning.
  uint64_t segments() const { return segments_; }
  uint64_t tokens() const { return tokens_; }
  // The segment held back, perhaps not full yet.
  const std::vector<int64_t>& held() const { return held_; }

  // False once a memory was not finite. The device then keeps the memory of the segments before that launch: folded()
  // of them; unfolded() are the ids of those after it, held ones not among them.
  bool finite() const { return finite_; }
  uint64_t folded() const { return folded_; }
  std::vector<std::vector<int64_t>> unfolded() const;

  // Outputs of the segments that came down since the last call, [segments, bytes] each; only of finite ones.
  std::vector<std::vector<uint8_t>> take_outputs();

  const GraphRunnerStats& stats() const { return stats_; }

 private:
  // Pinned memory of one piece and what tells how far its way has come.
  struct Piece {
    int64_t* ids = nullptr;        // [piece_segments, segment_size]
    int64_t* lengths = nullptr;    // [piece_segments]
    int64_t* place = nullptr;      // its first place in the ring; never changes
    int32_t* finite = nullptr;     // [piece_segments]
    std::vector<uint8_t*> output;  // [piece_segments, bytes] each
    cuda::Event uploaded = nullptr, computed = nullptr, downloaded = nullptr;
    size_t filled = 0;  // segments
    bool in_flight = false;
  };

  template <class Work>
  auto used(Work work);
  template <class Work>
  void on_device(Work work);

  void allocate();
  void place_piece(Piece& piece, char*& at);
  void release() noexcept;
  bool read(SegmentStream& stream, size_t limit, const Poll& poll);
  void take(const Segment& segment);
  void fill(Piece& piece);
  void flush();
  void upload(Piece& piece);
  void launch(size_t segments);
  void download(Piece& piece);
  void collect(Piece& piece);
  void keep_outputs(const Piece& piece, size_t segments);

  const cuda::DriverTable& cuda_;
  const GraphRunnerOptions options_;
  cuda::Context context_ = nullptr;
  cuda::Stream up_ = nullptr, down_ = nullptr;
  void* pinned_ = nullptr;
  std::array<Piece, kPieces> pieces_;
  size_t current_ = 0;  // the piece that is filled next, or being filled: the oldest

  std::vector<int64_t> held_;
  size_t held_size_, next_size_;  // tokens of the segment that is held when it is full, and of the others
  uint64_t segments_ = 0, tokens_ = 0, folded_ = 0;
  bool finite_ = true;
  size_t first_bad_ = 0;  // the place in the current piece where it was not
  std::string failure_;   // why it is of no more use
  std::atomic<bool> in_use_{false};
  std::vector<std::vector<uint8_t>> outputs_;
  GraphRunnerStats stats_;
};

}  // namespace rmt
