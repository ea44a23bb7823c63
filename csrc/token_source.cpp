#include "token_source.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "npy_header.hpp"

namespace rmt {
namespace {

// Tokens per piece: 256 KiB as int64, which stays in the second-level cache.
constexpr size_t kPiece = 32768;

// Ids below this are dropped by a flag each; no vocabulary is larger.
constexpr int64_t kFlagLimit = 1 << 20;

static_assert(sizeof(off_t) == 8, "files over 2 GiB need 64-bit offsets");

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Marks that a push is under way, and lets the next one in when it ends, however it ends.
class Turn {
 public:
  Turn(bool& taken, std::condition_variable& changed) : taken_(taken), changed_(changed) { taken_ = true; }
  ~Turn() {
    taken_ = false;
    changed_.notify_all();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  bool& taken_;
  std::condition_variable& changed_;
};

class FileReader : public TokenReader {
 public:
  FileReader(std::shared_ptr<const FileSource> source, const DropSet& drop, uint64_t start)
      : TokenReader(drop),
        source_(std::move(source)),
        bytes_(kPiece * info(source_->dtype()).item_size),
        position_(start) {}

 protected:
  size_t fill(int64_t* out, size_t capacity) override {
    const size_t count = std::min<uint64_t>(std::min(capacity, kPiece), source_->size() - position_);
    if (count == 0) return 0;
    source_->read_bytes(position_, count, bytes_.data());
    widen(bytes_.data(), source_->dtype(), count, out);
    position_ += count;
    return count;
  }

 private:
  std::shared_ptr<const FileSource> source_;
  std::vector<char> bytes_;
  uint64_t position_;
};

class QueueReader : public TokenReader {
 public:
  QueueReader(std::shared_ptr<PushedSource> source, const DropSet& drop)
      : TokenReader(drop), source_(std::move(source)) {}
  ~QueueReader() override { source_->stop_reading(); }  // a stream that failed to start must not leave a push waiting
  void stop() override {
    TokenReader::stop();
    source_->stop_reading();
  }

 protected:
  size_t fill(int64_t* out, size_t capacity) override { return source_->pop(out, capacity); }

 private:
  std::shared_ptr<PushedSource> source_;
};

}  // namespace

DropSet::DropSet(const std::vector<int64_t>& ids) {
  for (int64_t id : ids) {
    if (id < 0 || id >= kFlagLimit) {
      others_.push_back(id);
      continue;
    }
    if (flags_.size() <= static_cast<size_t>(id)) flags_.resize(static_cast<size_t>(id) + 1);
    flags_[static_cast<size_t>(id)] = true;
  }
  std::sort(others_.begin(), others_.end());
}

bool DropSet::contains(int64_t id) const {
  if (static_cast<uint64_t>(id) < flags_.size()) return flags_[static_cast<size_t>(id)];
  return !others_.empty() && std::binary_search(others_.begin(), others_.end(), id);
}

size_t DropSet::filter(int64_t* ids, size_t count) const {
  if (empty()) return count;
  size_t kept = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t id = ids[i];
    ids[kept] = id;
    kept += !contains(id);
  }
  return kept;
}

TokenReader::TokenReader(const DropSet& drop) : drop_(drop), piece_(kPiece) {}

size_t TokenReader::read(int64_t* out, size_t capacity) {
  while (begin_ == end_) {
    if (stopped_) throw Stopped(kStoppedEarly);  // here too: a file may hold nothing but dropped ids
    const size_t came = fill(piece_.data(), piece_.size());
    if (came == 0) return 0;
    begin_ = 0;
    end_ = drop_.filter(piece_.data(), came);
  }
  const size_t count = std::min(capacity, end_ - begin_);
  std::copy_n(piece_.data() + begin_, count, out);
  begin_ += count;
  return count;
}

FileSource::FileSource(std::string path, std::optional<DType> dtype, const std::vector<int64_t>& drop_ids,
                       uint64_t start)
    : TokenSource(drop_ids), path_(std::move(path)), start_(start) {
  try {
    const uint64_t file_size = open_file();
    ends_with(path_, ".npy") ? open_npy(file_size, dtype) : open_raw(file_size, dtype);
    check_start();
  } catch (...) {
    if (file_ >= 0) ::close(file_);  // no destructor runs for a constructor that throws
    throw;
  }
}

FileSource::~FileSource() { ::close(file_); }

uint64_t FileSource::open_file() {
  // O_NONBLOCK: opening a FIFO must come back with our message instead of waiting for its writer.
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  struct stat status;
  if (file_ < 0 || ::fstat(file_, &status) != 0) {
    throw InputError(path_ + ": cannot open the token file: " + std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw InputError(path_ + ": expected a token file, came " +
                     (S_ISDIR(status.st_mode) ? "a directory" : "a pipe or device") +
                     "; name a .npy or .bin file, or push the tokens");
  }
#ifdef POSIX_FADV_SEQUENTIAL
  ::posix_fadvise(file_, 0, 0, POSIX_FADV_SEQUENTIAL);
#endif
  return static_cast<uint64_t>(status.st_size);
}

void FileSource::open_npy(uint64_t file_size, std::optional<DType> dtype) {
  std::string start(std::min<uint64_t>(file_size, 12 + kNpyMaxHeader), '\0');
  start.resize(read_at(0, start.data(), start.size()));
  const NpyHeader header = parse_npy_header(start, file_size, path_);
  if (dtype && *dtype != header.dtype) {
    throw ArgumentError(path_ + ": dtype=\"" + info(*dtype).name + "\" does not agree with the file, which holds " +
                        info(header.dtype).name + "; pass dtype=\"auto\"");
  }
  dtype_ = header.dtype;
  size_ = header.count;
  data_offset_ = header.data_offset;
}

void FileSource::open_raw(uint64_t file_size, std::optional<DType> dtype) {
  if (!dtype) {
    throw ArgumentError(path_ + ": a raw token file does not name its type; pass dtype, one of " + kDTypeNames);
  }
  std::string start(kNpyMagic.size(), '\0');
  if (read_at(0, start.data(), start.size()) == start.size() && start == kNpyMagic) {
    throw InputError(path_ + ": expected raw tokens, came a file with an .npy header; rename it to .npy");
  }
  const uint64_t item_size = info(*dtype).item_size;
  if (file_size % item_size != 0) {
    throw InputError(path_ + ": expected a multiple of " + std::to_string(item_size) + " bytes (" + info(*dtype).name +
                     "), came " + std::to_string(file_size) + " bytes; check dtype, or copy the file again");
  }
  dtype_ = *dtype;
  size_ = file_size / item_size;
}

// The end itself is a place to start: a run that read all of its input resumes there.
void FileSource::check_start() const {
  if (start_ <= size_) return;
  throw InputError(path_ + ": cannot start at token " + std::to_string(start_) + ": the file holds only " +
                   std::to_string(size_) + "; check that it is the file this place was noted for");
}

std::unique_ptr<TokenReader> FileSource::reader() {
  return std::make_unique<FileReader>(shared_from_this(), drop_, start_);
}

uint64_t FileSource::count(const Poll& poll) {
  if (drop_.empty()) return size_ - start_;
  const auto pass = reader();
  std::vector<int64_t> tokens(kPiece);
  uint64_t count = 0;
  while (const size_t came = pass->read(tokens.data(), tokens.size())) {
    count += came;
    if (poll) poll();
  }
  return count;
}

void FileSource::read_bytes(uint64_t position, size_t count, char* out) const {
  const size_t item_size = info(dtype_).item_size;
  // Both products are below the file's size, which the constructor checked.
  const size_t came = read_at(data_offset_ + position * item_size, out, count * item_size);
  if (came == count * item_size) return;
  throw InputError(path_ + ": the file became shorter while it was read: expected " + std::to_string(size_) +
                   " tokens, came " + std::to_string(position + came / item_size) +
                   "; leave the file alone until the run ends");
}

size_t FileSource::read_at(uint64_t offset, char* out, size_t size) const {
  size_t done = 0;
  while (done < size) {
    const ssize_t came = ::pread(file_, out + done, size - done, static_cast<off_t>(offset + done));
    if (came == 0) break;
    if (came > 0) {
      done += static_cast<size_t>(came);
    } else if (errno != EINTR) {
      throw InputError(path_ + ": cannot read the token file at byte " + std::to_string(offset + done) + ": " +
                       std::strerror(errno));
    }
  }
  return done;
}

PushedSource::PushedSource(const std::vector<int64_t>& drop_ids, size_t capacity) : TokenSource(drop_ids) {
  if (capacity == 0) throw ArgumentError("capacity: expected at least 1 token, came 0");
  queue_.resize(capacity);
}

void PushedSource::push(const void* data, DType dtype, size_t count, const Poll& poll) {
  const char* bytes = static_cast<const char*>(data);
  std::unique_lock lock(mutex_);
  wait_polling(not_full_, lock, poll, [&] { return !pushing_ || closed_ || stopped_; });
  check_open();
  const Turn turn(pushing_, not_full_);
  while (count > 0) {
    wait_polling(not_full_, lock, poll, [&] { return used_ < queue_.size() || closed_ || stopped_; });
    check_open();
    const size_t done = push_piece(bytes, dtype, count);
    bytes += done * info(dtype).item_size;
    count -= done;
  }
}

void PushedSource::check_open() const {
  if (closed_) throw ArgumentError("push() after close() or fail(): the input has ended; open another source");
  if (stopped_) throw Stopped("push(): the stream that reads this source has stopped; push no more");
}

// Up to the end of the queue, or of its storage: the caller comes back for the rest.
size_t PushedSource::push_piece(const char* data, DType dtype, size_t count) {
  const size_t end = (begin_ + used_) % queue_.size();
  const size_t piece = std::min({count, kPiece, queue_.size() - used_, queue_.size() - end});
  widen(data, dtype, piece, queue_.data() + end);
  used_ += piece;
  not_empty_.notify_one();
  return piece;
}

void PushedSource::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  not_empty_.notify_all();
  not_full_.notify_all();
}

void PushedSource::fail(std::string message) {
  const std::lock_guard lock(mutex_);
  if (closed_) return;  // what ended the input first is what the consumer hears of
  failure_ = std::move(message);
  closed_ = true;
  not_empty_.notify_all();
  not_full_.notify_all();
}

size_t PushedSource::pop(int64_t* out, size_t capacity) {
  std::unique_lock lock(mutex_);
  not_empty_.wait(lock, [&] { return used_ > 0 || closed_ || stopped_; });
  if (stopped_) throw Stopped(kStoppedEarly);
  if (used_ == 0 && failure_) throw InputError(*failure_);
  const size_t count = std::min({capacity, used_, queue_.size() - begin_});
  std::copy_n(queue_.data() + begin_, count, out);
  begin_ = (begin_ + count) % queue_.size();
  used_ -= count;
  not_full_.notify_all();
  return count;
}

void PushedSource::stop_reading() {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  not_empty_.notify_all();
  not_full_.notify_all();
}

std::unique_ptr<TokenReader> PushedSource::reader() {
  const std::lock_guard lock(mutex_);
  if (has_reader_) throw ArgumentError("a pushed source is read once, by one stream; make one source per stream");
  has_reader_ = true;
  return std::make_unique<QueueReader>(shared_from_this(), drop_);
}

uint64_t PushedSource::size() const {
  throw ArgumentError(
      "size: tokens that are pushed cannot be counted before they come; pass the length, or use a file");
}

uint64_t PushedSource::count(const Poll&) {
  throw ArgumentError(
      "count(): tokens that are pushed cannot be counted before they come; pass the length, or use a file");
}

}  // namespace rmt
