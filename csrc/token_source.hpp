// Where tokens come from: a token file of any size, or pushes from another thread; some ids may be dropped on the way.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "dtype.hpp"
#include "errors.hpp"
#include "polling.hpp"

namespace rmt {

// A set of token ids that are taken out of the input (padding, say).
class DropSet {
 public:
  DropSet() = default;
  explicit DropSet(const std::vector<int64_t>& ids);

  bool empty() const { return flags_.empty() && others_.empty(); }
  bool contains(int64_t id) const;
  size_t filter(int64_t* ids, size_t count) const;  // in place; returns how many stay

 private:
  std::vector<bool> flags_;      // the ids a vocabulary can have
  std::vector<int64_t> others_;  // sorted: negative or huge ids
};

// One pass over a source, for one thread. Hands out the tokens that stay after dropping.
class TokenReader {
 public:
  explicit TokenReader(const DropSet& drop);
  virtual ~TokenReader() = default;

  // Waits for at least one token and writes up to `capacity`; 0 is the end. Throws InputError or Stopped.
  size_t read(int64_t* out, size_t capacity);

  // From any thread: ends this pass, and wakes a read() that waits for input.
  virtual void stop() { stopped_ = true; }

 protected:
  virtual size_t fill(int64_t* out, size_t capacity) = 0;  // like read(), before dropping

 private:
  const DropSet& drop_;
  std::vector<int64_t> piece_;
  size_t begin_ = 0, end_ = 0;
  std::atomic<bool> stopped_{false};
};

class TokenSource {
 public:
  explicit TokenSource(const std::vector<int64_t>& drop_ids) : drop_(drop_ids) {}
  virtual ~TokenSource() = default;
  TokenSource(const TokenSource&) = delete;
  TokenSource& operator=(const TokenSource&) = delete;

  virtual std::unique_ptr<TokenReader> reader() = 0;
  virtual uint64_t size() const = 0;             // tokens before dropping
  virtual uint64_t count(const Poll& poll) = 0;  // tokens after dropping: a pass over the input

 protected:
  const DropSet drop_;
};

// A token file. It is read with pread in pieces and never mapped: a file that shrinks under a mapping kills the process
// with SIGBUS, here it is an InputError; and what was read leaves no page in our resident memory.
class FileSource : public TokenSource, public std::enable_shared_from_this<FileSource> {
 public:
  // `dtype`: none for the type the file itself names (.npy); a raw file needs one.
  // `start`: the token of the file, before dropping, that every pass begins with.
  FileSource(std::string path, std::optional<DType> dtype, const std::vector<int64_t>& drop_ids, uint64_t start = 0);
  ~FileSource() override;

  std::unique_ptr<TokenReader> reader() override;
  uint64_t size() const override { return size_; }  // the whole file, whatever `start` is
  uint64_t count(const Poll& poll) override;        // from `start` on
  DType dtype() const { return dtype_; }

  // Fills `out` with the bytes of `count` tokens from token `position` on; throws InputError if they are not there.
  void read_bytes(uint64_t position, size_t count, char* out) const;

 private:
  uint64_t open_file();
  void open_npy(uint64_t file_size, std::optional<DType> dtype);
  void open_raw(uint64_t file_size, std::optional<DType> dtype);
  void check_start() const;
  size_t read_at(uint64_t offset, char* out, size_t size) const;

  const std::string path_;
  const uint64_t start_;
  int file_ = -1;
  DType dtype_ = DType::kInt64;
  uint64_t data_offset_ = 0, size_ = 0;
};

// A bounded queue of tokens: other threads push, one stream reads.
class PushedSource : public TokenSource, public std::enable_shared_from_this<PushedSource> {
 public:
  PushedSource(const std::vector<int64_t>& drop_ids, size_t capacity);

  // Waits while the queue is full. Pushes from several threads follow one another whole. If `poll` throws, the tokens
  // that already went in stay in.
  void push(const void* data, DType dtype, size_t count, const Poll& poll);
  void close();                    // the input ends after what was pushed
  void fail(std::string message);  // the input ends with an InputError after what was pushed

  std::unique_ptr<TokenReader> reader() override;  // once
  uint64_t size() const override;                  // throws: a queue does not know
  uint64_t count(const Poll& poll) override;       // throws likewise

  size_t pop(int64_t* out, size_t capacity);  // for the reader: waits for tokens; 0 is the end
  void stop_reading();                        // for the reader: nobody will pop again

 private:
  void check_open() const;
  size_t push_piece(const char* data, DType dtype, size_t count);

  mutable std::mutex mutex_;
  std::condition_variable not_full_, not_empty_;
  std::vector<int64_t> queue_;  // a ring: `used_` tokens from `begin_`
  size_t begin_ = 0, used_ = 0;
  bool pushing_ = false, closed_ = false, stopped_ = false, has_reader_ = false;
  std::optional<std::string> failure_;
};

}  // namespace rmt
