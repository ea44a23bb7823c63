#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "../token_source.hpp"
#include "check.hpp"
#include "temp_file.hpp"

using namespace rmt;

namespace {

using Ids = std::vector<int64_t>;

Ids read_all(TokenSource& source, size_t at_a_time = 1000) {
  const auto reader = source.reader();
  Ids all, piece(at_a_time);
  while (const size_t came = reader->read(piece.data(), piece.size())) {
    all.insert(all.end(), piece.begin(), piece.begin() + came);
  }
  return all;
}

std::shared_ptr<FileSource> open(const TempFile& file, std::optional<DType> dtype, const Ids& drop = {}) {
  return std::make_shared<FileSource>(file.path, dtype, drop);
}

template <class T>
void check_raw(DType dtype, const std::vector<T>& values) {
  const TempFile file("t.bin", bytes_of(values));
  const auto source = open(file, dtype);
  CHECK(source->size() == values.size());
  CHECK(read_all(*source) == Ids(values.begin(), values.end()));
}

void push(PushedSource& source, const Ids& ids, const Poll& poll = {}) {
  source.push(ids.data(), DType::kInt64, ids.size(), poll);
}

std::shared_ptr<PushedSource> pushed(size_t capacity, const Ids& drop = {}) {
  return std::make_shared<PushedSource>(drop, capacity);
}

Ids range(int64_t count) {
  Ids ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

}  // namespace

TEST("file: raw tokens of every type, at their limits") {
  check_raw<uint8_t>(DType::kUint8, {0, 1, 255});
  check_raw<uint16_t>(DType::kUint16, {0, 1, 65535});
  check_raw<uint32_t>(DType::kUint32, {0, 1, 4294967295u});
  check_raw<int32_t>(DType::kInt32, {INT32_MIN, -1, 0, INT32_MAX});
  check_raw<int64_t>(DType::kInt64, {INT64_MIN, -1, 0, INT64_MAX});
  check_raw<uint16_t>(DType::kUint16, {});
}

TEST("file: longer than a piece, read by odd amounts, by two readers at once") {
  const Ids ids = range(100001);
  const TempFile file("t.bin", bytes_of(ids));
  const auto source = open(file, DType::kInt64);
  const auto other = source->reader();
  int64_t first = -1;
  CHECK(other->read(&first, 1) == 1);
  CHECK(read_all(*source, 777) == ids);
  CHECK(read_all(*source, 1) == ids);
}

TEST("file: the end of 5 GiB is where it should be") {
  const TempFile file("t.bin", "");
  const uint64_t size = uint64_t{5} << 30;
  CHECK(::truncate(file.path.c_str(), static_cast<off_t>(size - 4)) == 0);  // sparse
  std::FILE* end = std::fopen(file.path.c_str(), "ab");
  const int32_t last = 12345;
  CHECK(end && std::fwrite(&last, 4, 1, end) == 1);
  std::fclose(end);
  const auto source = open(file, DType::kInt32);
  CHECK(source->size() == size / 4);
  int32_t came[2] = {-1, -1};
  source->read_bytes(source->size() - 2, 2, reinterpret_cast<char*>(came));
  CHECK(came[0] == 0 && came[1] == last);
}

TEST("file: .npy names its type, and dtype must agree") {
  const std::vector<uint16_t> values{5, 6, 65535};
  const TempFile file("t.npy", npy("{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }", bytes_of(values)));
  CHECK(read_all(*open(file, std::nullopt)) == (Ids{5, 6, 65535}));
  CHECK(read_all(*open(file, DType::kUint16)) == (Ids{5, 6, 65535}));
  CHECK_THROWS(ArgumentError, "dtype=\"int32\" does not agree with the file, which holds uint16",
               open(file, DType::kInt32));
}

TEST("file: what cannot be opened") {
  const TempFile odd("t.bin", "abc"), header("u.bin", npy("{}", "")), plain("t.npy", "abcdefghijkl");
  CHECK_THROWS(InputError, "expected a multiple of 2 bytes (uint16), came 3 bytes", open(odd, DType::kUint16));
  CHECK_THROWS(ArgumentError, "does not name its type; pass dtype", open(odd, std::nullopt));
  CHECK_THROWS(InputError, "rename it to .npy", open(header, DType::kUint8));
  CHECK_THROWS(InputError, "does not start with the .npy magic", open(plain, std::nullopt));
  CHECK_THROWS(InputError, "No such file or directory", FileSource("/nowhere/t.bin", DType::kUint16, {}));
  CHECK_THROWS(InputError, "came a directory", FileSource("/tmp", DType::kUint16, {}));
  const TempFile fifo("t.bin", "");
  ::unlink(fifo.path.c_str());
  CHECK(::mkfifo(fifo.path.c_str(), 0600) == 0);
  CHECK_THROWS(InputError, "came a pipe or device", open(fifo, DType::kUint16));
}

TEST("file: a start counts tokens before dropping, and size() the whole file") {
  const Ids ids = range(100001);
  const TempFile file("t.bin", bytes_of(ids));
  for (size_t start : {0, 1, 32767, 32768, 99999, 100000, 100001}) {
    FileSource whole(file.path, DType::kInt64, {}, start);
    CHECK(whole.size() == ids.size() && whole.count({}) == ids.size() - start);
    const auto source = std::make_shared<FileSource>(file.path, DType::kInt64, Ids{99999}, start);
    Ids expected(ids.begin() + static_cast<std::ptrdiff_t>(start), ids.end());
    expected.erase(std::remove(expected.begin(), expected.end(), 99999), expected.end());
    CHECK(read_all(*source, 999) == expected && read_all(*source) == expected);
    CHECK(source->size() == ids.size() && source->count({}) == expected.size());
  }
  for (uint64_t start : {uint64_t{100002}, UINT64_MAX}) {
    CHECK_THROWS(InputError, "cannot start at token " + std::to_string(start) + ": the file holds only 100001",
                 FileSource(file.path, DType::kInt64, {}, start));
  }
}

TEST("file: one that shrinks while it is read is an error, not a crash") {
  const TempFile file("t.bin", bytes_of(range(100000)));
  const auto source = open(file, DType::kInt64);
  const auto reader = source->reader();
  Ids ids(10);
  CHECK(reader->read(ids.data(), 10) == 10);
  CHECK(::truncate(file.path.c_str(), 8 * 40000) == 0);
  CHECK_THROWS(InputError, "became shorter while it was read: expected 100000 tokens, came 40000",
               while (reader->read(ids.data(), 10)){});
}

TEST("drop: small, negative and huge ids") {
  const TempFile file("t.bin", bytes_of(Ids{1, -1, 2, 2, INT64_MAX, 3, 1 << 20, INT64_MIN, 1}));
  const auto source = open(file, DType::kInt64, {1, -1, INT64_MAX, INT64_MIN, 1 << 20, 1});
  CHECK(read_all(*source) == (Ids{2, 2, 3}));
  CHECK(source->size() == 9);
  CHECK(source->count({}) == 3);
  CHECK(open(file, DType::kInt64, {1, 2, 3, -1, INT64_MAX, INT64_MIN, 1 << 20})->count({}) == 0);
}

TEST("file: a poll that throws ends count()") {
  const TempFile file("t.bin", bytes_of(range(100)));
  CHECK_THROWS(std::runtime_error, "ctrl-c",
               open(file, DType::kInt64, {5})->count([] { throw std::runtime_error("ctrl-c"); }));
}

TEST("file: stop() ends a reader in the middle of dropped tokens") {
  const TempFile file("t.bin", bytes_of(Ids(100000, 0)));
  const auto source = open(file, DType::kInt64, {0});
  const auto reader = source->reader();
  reader->stop();
  int64_t id;
  CHECK_THROWS(Stopped, "stopped before its input ended", reader->read(&id, 1));
}

TEST("pushed: order is kept around the ring, for every type") {
  const auto source = pushed(7, {3});
  std::thread producer([&] {
    for (int i = 0; i < 100; ++i) push(*source, {i, 3, i});
    const uint16_t last[] = {65535, 1};
    source->push(last, DType::kUint16, 2, {});
    source->push(nullptr, DType::kUint16, 0, {});
    source->close();
  });
  Ids expected;
  for (int i = 0; i < 100; ++i) {
    if (i != 3) expected.insert(expected.end(), {i, i});
  }
  expected.insert(expected.end(), {65535, 1});
  const Ids came = read_all(*source, 5);
  producer.join();
  CHECK(came == expected);
}

TEST("pushed: long pushes of several threads do not mix") {
  const auto source = pushed(16);
  std::vector<std::thread> producers;
  for (int64_t who = 0; who < 4; ++who) {
    producers.emplace_back([&, who] {
      for (int i = 0; i < 10; ++i) push(*source, Ids(100, who));
    });
  }
  Ids all(4000);
  const auto reader = source->reader();
  for (size_t done = 0; done < all.size();) done += reader->read(all.data() + done, all.size() - done);
  for (auto& producer : producers) producer.join();
  for (size_t i = 0; i < all.size(); ++i) CHECK(all[i] == all[i - i % 100]);
}

TEST("pushed: close() and fail() come after what was pushed") {
  const auto closed = pushed(8);
  push(*closed, {1, 2});
  closed->close();
  closed->close();
  closed->fail("too late");
  CHECK_THROWS(ArgumentError, "push() after close()", push(*closed, {3}));
  CHECK(read_all(*closed) == (Ids{1, 2}));

  const auto failed = pushed(8);
  push(*failed, {1, 2});
  failed->fail("byte 17 is not UTF-8");
  const auto reader = failed->reader();
  int64_t id;
  CHECK(reader->read(&id, 1) == 1 && reader->read(&id, 1) == 1 && id == 2);
  CHECK_THROWS(InputError, "byte 17 is not UTF-8", reader->read(&id, 1));
}

TEST("pushed: who waits is woken by close(), by stop() and by a poll that throws") {
  for (int way = 0; way < 2; ++way) {
    const auto source = pushed(2);
    const auto reader = source->reader();
    std::thread other([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      way == 0 ? source->close() : reader->stop();
    });
    if (way == 0) {
      CHECK_THROWS(ArgumentError, "after close()", push(*source, range(3)));
    } else {
      CHECK_THROWS(Stopped, "has stopped; push no more", push(*source, range(3)));
    }
    other.join();
  }
  const auto source = pushed(2);
  CHECK_THROWS(std::runtime_error, "ctrl-c", push(*source, range(3), [] { throw std::runtime_error("ctrl-c"); }));
  source->close();
  CHECK(read_all(*source) == (Ids{0, 1}));
}

TEST("pushed: an interrupted push gives up its turn") {
  const auto source = pushed(2);
  CHECK_THROWS(std::runtime_error, "ctrl-c", push(*source, range(3), [] { throw std::runtime_error("ctrl-c"); }));
  const auto reader = source->reader();
  int64_t ids[2];
  CHECK(reader->read(ids, 2) == 2);
  push(*source, {7});
  CHECK(reader->read(ids, 2) == 1 && ids[0] == 7);
}

TEST("pushed: a reader that waits is woken by stop()") {
  const auto source = pushed(2);
  const auto reader = source->reader();
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    reader->stop();
  });
  int64_t id;
  CHECK_THROWS(Stopped, "stopped", reader->read(&id, 1));
  other.join();
}

TEST("pushed: who waits is woken when the reader is gone without a stop()") {
  const auto source = pushed(2);
  auto reader = source->reader();
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    reader.reset();
  });
  CHECK_THROWS(Stopped, "push no more", push(*source, range(3)));
  other.join();
}

TEST("pushed: mistakes") {
  CHECK_THROWS(ArgumentError, "capacity: expected at least 1 token, came 0", pushed(0));
  const auto source = pushed(1);
  CHECK_THROWS(ArgumentError, "size: tokens that are pushed", source->size());
  CHECK_THROWS(ArgumentError, "count(): tokens that are pushed", source->count({}));
  const auto reader = source->reader();
  CHECK_THROWS(ArgumentError, "make one source per stream", source->reader());
}
