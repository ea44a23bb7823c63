#include <algorithm>
#include <numeric>
#include <thread>

#include "../graph_runner.hpp"
#include "../host_driver.hpp"
#include "check.hpp"
#include "fake_driver.hpp"

using namespace rmt;

namespace {

using Ids = std::vector<int64_t>;
using Segments = std::vector<Ids>;

constexpr size_t kSegment = 5, kPiece = 6, kPlaces = GraphRunner::kPieces * kPiece;

Ids range(size_t count) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), 100);
  return ids;
}

Segments cut(const Ids& ids, size_t first = kSegment, size_t size = kSegment) {
  Segments segments;
  for (size_t at = 0; at < ids.size(); at += segments.back().size()) {
    const size_t end = std::min(ids.size(), at + (at == 0 ? first : size));
    segments.emplace_back(ids.begin() + at, ids.begin() + end);
  }
  return segments;
}

std::shared_ptr<PushedSource> holding(const Ids& ids) {
  auto source = std::make_shared<PushedSource>(Ids{}, ids.size() + 1);
  source->push(ids.data(), DType::kInt64, ids.size(), {});
  source->close();
  return source;
}

StreamOptions stream_options(size_t first = kSegment, size_t size = kSegment) {
  StreamOptions o;
  o.segment_size = size;
  o.first_segment_size = first;
  return o;
}

template <class T>
cuda::DevicePointer address(std::vector<T>& values) {
  return reinterpret_cast<cuda::DevicePointer>(values.data());
}

// What lies on the device, and a "graph" that eats segments: it notes their ids and writes the outputs.
struct Device {
  Ids ids = Ids(kPlaces * kSegment, -1), lengths = Ids(kPlaces, -1), counter = Ids(1, -1);
  std::vector<int32_t> finite = std::vector<int32_t>(kPlaces, -1);
  std::vector<float> score = std::vector<float>(kPlaces * 2, -1);
  Segments eaten;
  size_t bad_from = SIZE_MAX;  // the segment that makes the memory not finite
  bool good = true;

  // As a captured graph does: no launch of which a segment is bad moves the memory.
  void fold(size_t segments) {
    const auto first = static_cast<size_t>(counter[0]);
    CHECK(first + segments <= kPlaces);
    good = good && eaten.size() + segments <= bad_from;
    for (size_t place = first; place < first + segments; ++place) {
      const int64_t* row = ids.data() + place * kSegment;
      CHECK(std::all_of(row + lengths[place], row + kSegment, [](int64_t id) { return id == 0; }));
      if (good) eaten.emplace_back(row, row + lengths[place]);
      finite[place] = good;
      score[2 * place] = static_cast<float>(row[0]);
      score[2 * place + 1] = static_cast<float>(lengths[place]);
    }
    counter[0] += static_cast<int64_t>(segments);
  }

  GraphRunnerOptions options(std::vector<SegmentGraph> graphs) {
    GraphRunnerOptions o;
    o.graphs = std::move(graphs);
    o.segment_size = kSegment;
    o.piece_segments = kPiece;
    o.ids = address(ids), o.lengths = address(lengths), o.counter = address(counter), o.finite = address(finite);
    o.outputs = {{address(score), 2 * sizeof(float)}};
    return o;
  }
};

SegmentGraph graph_of(size_t segments) { return {reinterpret_cast<cuda::GraphExec>(segments), segments}; }

// A fake driver, a device on it and the table that leads there.
struct Machine {
  fake::Installed driver;
  Device device;
  cuda::DriverTable table = fake::table();

  Machine() {
    driver.launch = [this](cuda::GraphExec graph) { device.fold(reinterpret_cast<size_t>(graph)); };
  }
  GraphRunnerOptions options() { return device.options({graph_of(1), graph_of(4)}); }
};

void run_through(GraphRunner& runner, SegmentStream& stream, size_t limit = kPiece) {
  while (runner.advance(stream, limit, {})) {
  }
  runner.finish();
}

void check_run(size_t tokens, size_t limit, fake::Pace pace, unsigned seed) {
  Machine machine;
  machine.driver.pace = pace;
  machine.driver.random.seed(seed);
  const Ids ids = range(tokens);
  {
    SegmentStream stream(holding(ids), stream_options());
    GraphRunner runner(machine.table, machine.options());
    run_through(runner, stream, limit);
    Segments wanted = cut(ids);
    CHECK(runner.held() == (wanted.empty() ? Ids{} : wanted.back()));
    if (!wanted.empty()) wanted.pop_back();
    CHECK(machine.device.eaten == wanted);
    CHECK(runner.segments() == wanted.size() && runner.folded() == wanted.size() && runner.finite());
    CHECK(runner.tokens() == wanted.size() * kSegment);
    const auto scores = runner.take_outputs().at(0);
    CHECK(scores.size() == wanted.size() * 2 * sizeof(float));
    for (size_t i = 0; i < wanted.size(); ++i) {
      float pair[2];
      std::memcpy(pair, scores.data() + i * sizeof(pair), sizeof(pair));
      CHECK(pair[0] == static_cast<float>(wanted[i][0]) && pair[1] == kSegment);
    }
    CHECK(runner.take_outputs().at(0).empty());
  }
  CHECK(machine.driver.clean());
}

}  // namespace

TEST("graph runner: every length, as late as it may be and at random") {
  for (size_t tokens = 0; tokens < 4 * kPiece * kSegment; tokens += 3) check_run(tokens, kPiece, fake::Pace::kLate, 0);
  for (unsigned seed = 0; seed < 60; ++seed) {
    check_run(seed * 7 % 190, 1 + seed % (kPiece + 2), fake::Pace::kRandom, seed);
  }
}

TEST("graph runner: the order of copies, launches and events") {
  Machine machine;
  SegmentStream stream(holding(range(kSegment * 10)), stream_options());
  GraphRunner runner(machine.table, machine.options());
  machine.driver.log.clear();
  run_through(runner, stream);
  std::vector<std::string> calls;
  for (const auto& call : machine.driver.log) {
    if (call.find("context") == std::string::npos) calls.push_back(call);
  }
  const std::vector<std::string> wanted = {
      // a piece of six segments: a launch of four and two of one
      "copy 240 up on up",
      "copy 48 up on up",
      "record uploadedA on up",
      "compute waits for uploadedA",
      "copy 8 up on compute",
      "launch 4 on compute",
      "launch 1 on compute",
      "launch 1 on compute",
      "record computedA on compute",
      "down waits for computedA",
      "copy 24 down on down",
      "copy 48 down on down",
      "record downloadedA on down",
      // three more; the tenth is held back
      "copy 120 up on up",
      "copy 24 up on up",
      "record uploadedB on up",
      "compute waits for uploadedB",
      "copy 8 up on compute",
      "launch 1 on compute",
      "launch 1 on compute",
      "launch 1 on compute",
      "record computedB on compute",
      "down waits for computedB",
      "copy 12 down on down",
      "copy 24 down on down",
      "record downloadedB on down",
      "host waits for downloadedA",
      "host waits for downloadedB",
  };
  CHECK(calls == wanted);
  CHECK(runner.stats().pieces == 2 && runner.stats().launches == 6);
}

TEST("graph runner: a piece is not filled again before it came back") {
  Machine machine;
  SegmentStream stream(holding(range(kSegment * (4 * kPiece + 1))), stream_options());
  GraphRunner runner(machine.table, machine.options());
  machine.driver.log.clear();
  CHECK(runner.advance(stream, kPiece, {}) && runner.advance(stream, kPiece, {}));
  CHECK(machine.device.eaten.empty());  // nobody has waited yet, so nothing had to run
  CHECK(runner.advance(stream, kPiece, {}));
  CHECK(machine.device.eaten.size() >= kPiece && machine.device.eaten.size() <= 2 * kPiece);
  const auto& log = machine.driver.log;
  const auto wait = std::find(log.begin(), log.end(), "host waits for downloadedA");
  CHECK(wait != log.end());
  CHECK(std::count(log.begin(), wait, "copy 240 up on up") == 2);
}

TEST("graph runner: a stream goes on from a rest, with short first segments and segments shorter than the graph's") {
  const Ids ids = range(83);
  const Segments wanted = cut(ids, 3, 4);
  for (size_t rest = 0; rest <= 3; ++rest) {
    Machine machine;
    const Ids begun(ids.begin(), ids.begin() + rest);
    const size_t room = rest == 3 ? 4 : 3 - rest;
    SegmentStream stream(holding(Ids(ids.begin() + rest, ids.end())), stream_options(room, 4));
    GraphRunner runner(machine.table, machine.options());
    runner.begin(begun, 3, 4);
    run_through(runner, stream);
    CHECK(machine.device.eaten == Segments(wanted.begin(), wanted.end() - 1));
    CHECK(runner.held() == wanted.back());
  }
}

TEST("graph runner: a stream that is cut otherwise is refused") {
  Machine machine;
  SegmentStream stream(holding(range(20)), stream_options());
  GraphRunner runner(machine.table, machine.options());
  runner.begin({1, 2}, 5, 5);
  CHECK_THROWS(ArgumentError, "the stream's segment of 5 tokens does not fit: 3 were left of a segment",
               runner.advance(stream, kPiece, {}));
  CHECK_THROWS(ArgumentError, "has begun before", runner.begin({}, 5, 5));
}

TEST("graph runner: arguments that cannot be meant") {
  Machine machine;
  const auto refused = [&](const char* words, auto change) {
    GraphRunnerOptions options = machine.options();
    change(options);
    CHECK_THROWS(ArgumentError, words, GraphRunner(machine.table, options));
  };
  refused("segment_size: expected at least 1", [](auto& o) { o.segment_size = 0; });
  refused("piece_segments: expected at least 1", [](auto& o) { o.piece_segments = 0; });
  refused("of pinned memory; use fewer", [](auto& o) { o.piece_segments = size_t{1} << 40; });
  refused("of pinned memory; use fewer", [](auto& o) { o.segment_size = SIZE_MAX / 8 + 2; });
  refused("expected one that folds a single segment", [](auto& o) { o.graphs = {graph_of(4)}; });
  refused("expected one that folds a single segment", [](auto& o) { o.graphs.clear(); });
  refused("one of them is null", [](auto& o) { o.graphs.push_back({nullptr, 2}); });
  GraphRunner runner(machine.table, machine.options());
  CHECK_THROWS(ArgumentError, "begin(): expected rest of 3 ≤ first=2", runner.begin({1, 2, 3}, 2, 5));
  CHECK_THROWS(ArgumentError, "≤ segment_size=5", runner.begin({}, 6, 6));
}

TEST("graph runner: a memory that is not finite stays where it was, and the ids after it are kept") {
  for (const size_t bad : {0u, 3u, 6u, 9u, 13u, 17u, 26u}) {
    Machine machine;
    machine.device.bad_from = bad;
    const Ids ids = range(kSegment * 30 + 2);
    SegmentStream stream(holding(ids), stream_options());
    GraphRunner runner(machine.table, machine.options());
    run_through(runner, stream);
    CHECK(!runner.finite());
    const size_t folded = runner.folded();
    CHECK(folded <= bad && folded + 4 > bad);  // the launch of up to four segments in which it came
    CHECK(machine.device.eaten.size() == folded);
    Segments all = machine.device.eaten;
    for (const Ids& segment : runner.unfolded()) all.push_back(segment);
    CHECK(all.size() == runner.segments());
    const Segments wanted = cut(ids);
    CHECK(std::equal(all.begin(), all.end(), wanted.begin()));
    CHECK(runner.held() == wanted[all.size()]);
    CHECK(runner.take_outputs().at(0).size() == folded * 2 * sizeof(float));
    CHECK(!runner.advance(stream, kPiece, {}));  // nothing moves any more
    CHECK(runner.segments() == all.size());
  }
}

TEST("graph runner: what the stream throws comes after the segments before it") {
  Machine machine;
  auto source = std::make_shared<PushedSource>(Ids{}, 1000);
  const Ids ids = range(kSegment * 9);
  source->push(ids.data(), DType::kInt64, ids.size(), {});
  source->fail("the disk is gone");
  SegmentStream stream(source, stream_options());
  GraphRunner runner(machine.table, machine.options());
  CHECK_THROWS(InputError, "the disk is gone", run_through(runner, stream));
  runner.finish();
  CHECK(runner.folded() == runner.segments() && runner.folded() >= 7);
  const Segments wanted = cut(ids);
  CHECK(machine.device.eaten == Segments(wanted.begin(), wanted.begin() + runner.folded()));
  CHECK(runner.held().size() == kSegment);
}

TEST("graph runner: every call of the driver fails once") {
  size_t last = 0;
  bool failed = true;
  for (; failed; ++last) {
    Machine machine;
    machine.driver.fail_at = last;
    machine.driver.failure = last % 2 ? 700 : cuda::kOutOfMemory;
    std::string said;
    bool out_of_memory = false;
    try {
      SegmentStream stream(holding(range(kSegment * 3 * kPiece)), stream_options());
      GraphRunner runner(machine.table, machine.options());
      try {
        run_through(runner, stream);
      } catch (const cuda::CudaError&) {
        machine.driver.fail_at = SIZE_MAX;
        const bool spoiled = std::string(machine.driver.failed).find("cuCtx") == std::string::npos;
        if (spoiled) CHECK_THROWS(cuda::CudaError, "this graph runner failed before: cu", runner.finish());
        throw;
      }
    } catch (const cuda::CudaOutOfMemory& error) {
      said = error.what();
      out_of_memory = true;
    } catch (const cuda::CudaError& error) {
      said = error.what();
    }
    failed = machine.driver.failed != nullptr;
    CHECK(machine.driver.clean());
    if (!failed) CHECK(said.empty());
    // Calls of a destructor, and of what gives the old context back, have nobody to tell.
    if (said.empty()) continue;
    CHECK(out_of_memory == (machine.driver.failure == cuda::kOutOfMemory));
    const std::string name = machine.driver.failed;
    CHECK(said == (out_of_memory ? name + " failed with CUDA_ERROR_OUT_OF_MEMORY (2): as the test asked"
                                 : name + " failed with CUDA_ERROR_ILLEGAL_ADDRESS (700): as the test asked"));
  }
  CHECK(last > 60);  // as many calls as a run of three pieces makes
}

TEST("graph runner: stopped at any moment, from within any call") {
  for (size_t at = 0; at < 80; ++at) {
    Machine machine;
    machine.driver.pace = fake::Pace::kRandom;
    const Ids ids = range(kSegment * 4 * kPiece);
    auto source = std::make_shared<PushedSource>(Ids{}, ids.size() + 1);  // never closed: only stop() ends it
    source->push(ids.data(), DType::kInt64, ids.size(), {});
    {
      SegmentStream stream(source, stream_options());
      GraphRunner runner(machine.table, machine.options());
      machine.driver.before_call = [&, begin = machine.driver.calls](size_t call) {
        if (call - begin == at) stream.stop();
      };
      const Poll poll = [&] { stream.stop(); };  // where the input ends before the calls do
      try {
        while (runner.advance(stream, kPiece, poll)) {
        }
        CHECK(false);
      } catch (const Stopped&) {
      }
      runner.finish();
      CHECK(runner.folded() == runner.segments());
      const Segments wanted = cut(ids);
      CHECK(machine.device.eaten == Segments(wanted.begin(), wanted.begin() + runner.folded()));
      if (runner.folded() > 0) CHECK(runner.held() == wanted[runner.folded()]);
    }
    CHECK(machine.driver.clean());
  }
}

TEST("graph runner: stopped by another thread") {
  for (int delay = 0; delay < 12; ++delay) {
    Machine machine;
    auto source = std::make_shared<PushedSource>(Ids{}, 1 << 12);
    SegmentStream stream(source, stream_options());
    GraphRunner runner(machine.table, machine.options());
    std::thread feeder([&] {
      const Ids ids = range(64);
      try {
        while (true) source->push(ids.data(), DType::kInt64, ids.size(), {});
      } catch (const Stopped&) {
      }
    });
    std::thread stopper([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(300 * delay));
      stream.stop();
    });
    CHECK_THROWS(Stopped, "stopped before its input ended", run_through(runner, stream));
    runner.finish();
    CHECK(runner.folded() == machine.device.eaten.size());
    feeder.join();
    stopper.join();
  }
}

TEST("graph runner: one thread at a time") {
  Machine machine;
  SegmentStream stream(std::make_shared<PushedSource>(Ids{}, 10), stream_options());
  GraphRunner runner(machine.table, machine.options());
  const Poll poll = [&] {
    CHECK_THROWS(ArgumentError, "another thread is using this graph runner", runner.finish());
    stream.stop();
  };
  CHECK_THROWS(Stopped, "stopped", runner.advance(stream, kPiece, poll));
}

TEST("graph runner: in its own context, whatever is current in the thread") {
  Machine machine;
  SegmentStream stream(holding(range(kSegment * 8)), stream_options());
  GraphRunner runner(machine.table, machine.options());
  const auto own = machine.driver.context;
  const auto other = reinterpret_cast<cuda::Context>(48);
  machine.driver.launch = [&](cuda::GraphExec graph) {
    CHECK(machine.driver.context == own);
    machine.device.fold(reinterpret_cast<size_t>(graph));
  };
  machine.driver.context = other;
  run_through(runner, stream);
  CHECK(machine.driver.context == other);
  CHECK(machine.device.eaten.size() == 7);
}

TEST("graph runner: on the host, with functions in place of graphs") {
  Device device;
  cuda::HostGraph one{[&] { device.fold(1); }}, four{[&] { device.fold(4); }};
  const Ids ids = range(kSegment * 33 + 1);
  SegmentStream stream(holding(ids), stream_options());
  GraphRunner runner(cuda::host_driver(), device.options({{exec_of(one), 1}, {exec_of(four), 4}}));
  run_through(runner, stream);
  const Segments wanted = cut(ids);
  CHECK(device.eaten == Segments(wanted.begin(), wanted.end() - 1));
  CHECK(runner.stats().launches == 5 * 3 + 3);  // five pieces of 4 + 1 + 1, and three segments
}

TEST("graph runner: what a function throws comes out, and the runner is of no more use") {
  Device device;
  cuda::HostGraph one{[&] {
    if (device.eaten.size() == 3) throw std::runtime_error("the function's own");
    device.fold(1);
  }};
  SegmentStream stream(holding(range(kSegment * 8)), stream_options());
  GraphRunner runner(cuda::host_driver(), device.options({{exec_of(one), 1}}));
  CHECK_THROWS(std::runtime_error, "the function's own", run_through(runner, stream));
  CHECK_THROWS(cuda::CudaError, "failed before: the function's own", runner.advance(stream, kPiece, {}));
}
