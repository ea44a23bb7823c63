#include <numeric>
#include <random>
#include <thread>

#include "../segment_stream.hpp"
#include "check.hpp"
#include "temp_file.hpp"

using namespace rmt;

namespace {

using Ids = std::vector<int64_t>;

Ids range(size_t count) {
  Ids ids(count);
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

StreamOptions options(size_t segment_size, size_t first = 0, size_t ring_slots = 3) {
  StreamOptions o;
  o.segment_size = segment_size;
  o.first_segment_size = first ? first : segment_size;
  o.ring_slots = ring_slots;
  return o;
}

// A queue that holds `ids` and is closed.
std::shared_ptr<PushedSource> holding(const Ids& ids) {
  auto source = std::make_shared<PushedSource>(Ids{}, ids.size() + 1);
  source->push(ids.data(), DType::kInt64, ids.size(), {});
  source->close();
  return source;
}

std::shared_ptr<PushedSource> open_queue(const Ids& ids, size_t capacity = 1000) {
  auto source = std::make_shared<PushedSource>(Ids{}, capacity);
  source->push(ids.data(), DType::kInt64, ids.size(), {});
  return source;
}

Ids ids_of(const Segment& segment) { return {segment.ids, segment.ids + segment.size}; }

void check_cut(size_t count, const StreamOptions& o) {
  SegmentStream stream(holding(range(count)), o);
  size_t position = 0, index = 0;
  while (const auto segment = stream.next({})) {
    const size_t wanted = index == 0 ? o.first_segment_size : o.segment_size;
    CHECK(segment->index == index++);
    CHECK(segment->position == position);
    CHECK(segment->size == std::min(wanted, count - position));
    for (size_t i = 0; i < segment->size; ++i) CHECK(segment->ids[i] == static_cast<int64_t>(position + i));
    position += segment->size;
    CHECK(segment->last == (position == count));
  }
  CHECK(position == count);
  CHECK(!stream.next({}));
  CHECK(stream.stats().segments == index);
  CHECK(stream.stats().tokens == count);
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

}  // namespace

TEST("segments: every length around the borders, every first segment, every ring") {
  for (size_t size : {1, 2, 5}) {
    for (size_t first = 1; first <= size; ++first) {
      for (size_t slots : {1, 2, 3}) {
        for (size_t count = 0; count < 17; ++count) check_cut(count, options(size, first, slots));
      }
    }
  }
}

TEST("segments: from a file that is longer than the ring and than a piece") {
  const Ids ids = range(200003);
  const TempFile file("t.bin", bytes_of(ids));
  const auto source = std::make_shared<FileSource>(file.path, DType::kInt64, Ids{7, 100});
  SegmentStream stream(source, options(112));
  uint64_t tokens = 0, sum = 0;
  while (const auto segment = stream.next({})) {
    CHECK(segment->position == tokens);
    tokens += segment->size;
    sum += std::accumulate(segment->ids, segment->ids + segment->size, uint64_t{0});
  }
  CHECK(tokens == 200001);
  CHECK(sum == 200003ull * 200002 / 2 - 107);
}

TEST("segments: a full segment waits for the token after it") {
  const auto source = open_queue(range(4));
  SegmentStream stream(source, options(4));
  std::thread producer([&] {
    sleep_ms(30);
    source->close();
  });
  const auto segment = stream.next({});
  CHECK(segment && segment->last && segment->size == 4);
  CHECK(stream.stats().consumer_wait_seconds > 0.01);
  producer.join();
}

TEST("vocabulary: the bad token comes after the segments before it") {
  for (int64_t bad : {int64_t{100}, int64_t{-1}, INT64_MAX}) {
    for (size_t at = 0; at < 9; ++at) {
      Ids ids = range(9);
      ids[at] = bad;
      auto o = options(3);
      o.vocab_size = 100;
      SegmentStream stream(holding(ids), o);
      for (size_t i = 0; i < at / 3; ++i) {
        const auto segment = stream.next({});
        CHECK(segment && segment->index == i && !segment->last);
      }
      const std::string words = "token " + std::to_string(bad) + " at position " + std::to_string(at) +
                                " is outside the vocabulary: expected 0 to 99;";
      CHECK_THROWS(InputError, words, stream.next({}));
      CHECK_THROWS(InputError, words, stream.next({}));
    }
  }
}

TEST("errors: a source that fails on a border still gives the full segment before") {
  for (size_t count : {4, 5, 7, 8}) {
    const auto source = open_queue(range(count));
    source->fail("the disk is gone");
    SegmentStream stream(source, options(4));
    for (size_t i = 0; i < count / 4; ++i) CHECK(stream.next({}).value().last == false);
    CHECK_THROWS(InputError, "the disk is gone", stream.next({}));
  }
}

TEST("errors: when the reader gives up, so does who pushes") {
  const auto source = open_queue({500}, 4);
  auto o = options(4);
  o.vocab_size = 100;
  SegmentStream stream(source, o);
  const Ids ids = range(100);
  CHECK_THROWS(Stopped, "push no more", source->push(ids.data(), DType::kInt64, ids.size(), {}));
  CHECK_THROWS(InputError, "token 500 at position 0", stream.next({}));
}

TEST("ring: the reader never runs further ahead than the ring and its pieces") {
  const auto source = std::make_shared<PushedSource>(Ids{}, 4);
  SegmentStream stream(source, options(4, 4, 2));
  std::atomic<size_t> pushed{0};
  std::thread producer([&] {
    for (int64_t id = 0; id < 400; ++id, ++pushed) source->push(&id, DType::kInt64, 1, {});
    source->close();
  });
  sleep_ms(50);
  CHECK(pushed <= 2 * 4 + 1 + 4 + 4);  // two slots, the token ahead, the reader's piece, the queue
  int64_t expected = 0;
  while (const auto segment = stream.next({})) {
    for (size_t i = 0; i < segment->size; ++i) CHECK(segment->ids[i] == expected++);
  }
  producer.join();
  CHECK(expected == 400);
  CHECK(stream.stats().reader_wait_seconds > 0.01);
}

TEST("ring: the slot of a segment is not written before the following next()") {
  SegmentStream stream(holding(range(1000)), options(10, 10, 2));
  while (const auto segment = stream.next({})) {
    const Ids before = ids_of(*segment);
    if (segment->index % 10 == 0) sleep_ms(1);
    CHECK(ids_of(*segment) == before);
    CHECK(segment->valid());
  }
}

TEST("ring: an old segment knows it is old, and its memory outlives the stream") {
  std::optional<Segment> first, second;
  {
    SegmentStream stream(holding(range(8)), options(4));
    first = stream.next({});
    second = stream.next({});
    CHECK(!first->valid() && second->valid());
  }
  CHECK(second->valid());  // stopping overwrites nothing
  CHECK(ids_of(*second) == (Ids{4, 5, 6, 7}));
  CHECK(ids_of(*first).size() == 4);
}

TEST("stop: while next() waits, and again") {
  SegmentStream stream(open_queue({}), options(4));
  std::thread other([&] {
    sleep_ms(20);
    stream.stop();
    stream.stop();
  });
  CHECK_THROWS(Stopped, "the stream was stopped before its input ended", stream.next({}));
  other.join();
  CHECK_THROWS(Stopped, "stopped", stream.next({}));
}

TEST("stop: with segments ready it is no end of the input, after the end it is") {
  SegmentStream early(holding(range(100)), options(4));
  CHECK(early.next({}));
  early.stop();
  CHECK_THROWS(Stopped, "stopped", early.next({}));

  SegmentStream ended(holding(range(4)), options(4));
  CHECK(ended.next({})->last);
  CHECK(!ended.next({}));
  ended.stop();
  CHECK(!ended.next({}));
}

TEST("stop: by the destructor, with the reader held by a full ring and by an empty queue") {
  {
    SegmentStream stream(holding(range(1000)), options(4));
  }
  const auto source = open_queue({});
  {
    SegmentStream stream(source, options(4));
  }
  const int64_t id = 1;
  CHECK_THROWS(Stopped, "push no more", source->push(&id, DType::kInt64, 1, {}));
}

TEST("stop: at random moments, from two threads, with someone pushing") {
  std::mt19937 random(11);
  for (int round = 0; round < 200; ++round) {
    const auto source = std::make_shared<PushedSource>(Ids{}, 64);
    SegmentStream stream(source, options(1 + random() % 9, 0, 1 + random() % 4));
    std::thread producer([&] {
      const Ids ids = range(50);
      try {
        while (true) source->push(ids.data(), DType::kInt64, ids.size(), {});
      } catch (const Stopped&) {
      }
    });
    const auto pause = std::chrono::microseconds(random() % 500);
    const auto stopper = [&] {
      std::this_thread::sleep_for(pause);
      stream.stop();
    };
    std::thread one(stopper), two(stopper);
    try {
      while (stream.next({})) {
      }
      CHECK(false);
    } catch (const Stopped&) {
    }
    one.join();
    two.join();
    producer.join();
  }
}

TEST("stop: many push while it stops, closes or fails, and each push ends") {
  std::mt19937 random(12);
  for (int round = 0; round < 100; ++round) {
    const auto source = std::make_shared<PushedSource>(Ids{}, 1 + random() % 64);
    SegmentStream stream(source, options(1 + random() % 9, 0, 1 + random() % 4));
    std::vector<std::thread> producers;
    for (int who = 0; who < 4; ++who) {
      producers.emplace_back([&] {
        const Ids ids = range(50);
        try {
          while (true) source->push(ids.data(), DType::kInt64, ids.size(), {});
        } catch (const Stopped&) {
        } catch (const ArgumentError&) {  // the input was ended first
        }
      });
    }
    std::thread ender([&, pause = std::chrono::microseconds(random() % 300), way = random() % 3] {
      std::this_thread::sleep_for(pause);
      if (way == 0) source->close();
      if (way == 1) source->fail("the disk is gone");
      if (way == 2) stream.stop();
    });
    try {
      while (stream.next({})) {
      }
    } catch (const Stopped&) {
    } catch (const InputError&) {
    }
    ender.join();
    for (auto& producer : producers) producer.join();
  }
}

TEST("stop: from within the wait of a slow consumer, the ring full") {
  SegmentStream stream(holding(range(1000)), options(4));
  CHECK(stream.next({}));
  sleep_ms(5);
  std::thread one([&] { stream.stop(); }), two([&] { stream.stop(); });
  one.join();
  two.join();
  CHECK_THROWS(Stopped, "stopped", stream.next({}));
}

TEST("files: many streams on one source at once, some stopped early, read the same") {
  const TempFile file("t.bin", bytes_of(range(100000)));
  const auto source = std::make_shared<FileSource>(file.path, DType::kInt64, Ids{});
  std::atomic<int> wrong{0};
  std::vector<std::thread> readers;
  for (int who = 0; who < 4; ++who) {
    readers.emplace_back([&, who] {
      SegmentStream stream(source, options(100 + who));
      int64_t expected = 0;
      while (const auto segment = stream.next({})) {
        for (size_t i = 0; i < segment->size; ++i) wrong += segment->ids[i] != expected++;
        if (who == 0 && segment->index == 7) return;
      }
      wrong += expected != 100000;
    });
  }
  for (auto& reader : readers) reader.join();
  CHECK(wrong == 0);
}

TEST("next: a poll that throws ends the wait, and the stream goes on") {
  const auto source = open_queue({});
  SegmentStream stream(source, options(2));
  CHECK_THROWS(std::runtime_error, "ctrl-c", stream.next([] { throw std::runtime_error("ctrl-c"); }));
  const Ids ids = range(3);
  source->push(ids.data(), DType::kInt64, 3, {});
  CHECK(ids_of(stream.next({}).value()) == (Ids{0, 1}));
}

TEST("arguments: each mistake has its words") {
  const auto make = [](StreamOptions o) { SegmentStream stream(holding({}), o); };
  CHECK_THROWS(ArgumentError, "segment_size: expected at least 1", make(options(0)));
  CHECK_THROWS(ArgumentError, "ring_slots: expected 1 to 65536, came 0", make(options(4, 4, 0)));
  CHECK_THROWS(ArgumentError, "ring_slots: expected 1 to 65536, came 65537", make(options(4, 4, 65537)));
  CHECK_THROWS(ArgumentError, "first_segment_size: expected 1 to segment_size=4, came 5", make(options(4, 5)));
  CHECK_THROWS(ArgumentError, "use smaller segments or fewer slots", make(options(SIZE_MAX / 2)));
  auto o = options(4);
  o.vocab_size = 0;
  CHECK_THROWS(ArgumentError, "vocab_size: expected at least 1, came 0", make(o));
}
