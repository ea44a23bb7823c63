// Files that tests write, gone when the test ends.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

// One new folder per file, so that the name and its suffix are ours to choose.
class TempFile {
 public:
  TempFile(const std::string& name, const std::string& bytes) {
    if (!::mkdtemp(folder_)) std::abort();
    path = std::string(folder_) + "/" + name;
    write(bytes);
  }
  ~TempFile() {
    ::unlink(path.c_str());
    ::rmdir(folder_);
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;

  void write(const std::string& bytes) const {
    std::FILE* file = std::fopen(path.c_str(), "wb");
    if (!file || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size()) std::abort();
    std::fclose(file);
  }

  std::string path;

 private:
  char folder_[32] = "/tmp/rmt-test-XXXXXX";
};

template <class T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

// An .npy file of the given version, its dict as given.
inline std::string npy(const std::string& dict, const std::string& data, int version = 1) {
  std::string text = dict + "\n";
  const size_t length_bytes = version == 1 ? 2 : 4;
  std::string start = std::string("\x93NUMPY") + static_cast<char>(version) + '\0';
  for (size_t i = 0; i < length_bytes; ++i) start += static_cast<char>(text.size() >> (8 * i) & 0xff);
  return start + text + data;
}
