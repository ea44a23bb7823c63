// A token file of arbitrary bytes is either read as what it says, or refused with one of our own errors.
//
// The body is a libFuzzer target; without libFuzzer, the main() below feeds it files that were valid before a few
// changes, the same ones for the same seed.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "../npy_header.hpp"
#include "../segment_stream.hpp"
#include "../tests/temp_file.hpp"

using namespace rmt;

namespace {

uint64_t opened = 0, refused = 0;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

void read_all(const std::shared_ptr<FileSource>& source, uint64_t start) {
  StreamOptions options;
  options.segment_size = options.first_segment_size = 5;
  SegmentStream stream(source, options);
  uint64_t tokens = 0;
  while (const auto segment = stream.next({})) {
    require(segment->position == tokens, "positions follow one another");
    tokens += segment->size;
  }
  require(tokens == source->count({}), "count() is what a stream gives");
  require(tokens <= source->size() - start, "dropping adds no token");
}

// How to open the file comes from the input itself, so that a coverage-guided fuzzer may choose it.
void open_and_read(uint8_t how, const std::string& bytes) {
  static const TempFile npy("t.npy", ""), raw("t.bin", "");
  const TempFile& file = how & 1 ? raw : npy;
  file.write(bytes);
  const uint64_t start = how >> 6;
  const auto dtype = how & 1 ? std::optional(kDTypes[(how >> 1) % 5].dtype) : std::nullopt;
  try {
    const std::vector<int64_t> drop = how & 32 ? std::vector<int64_t>{0, 1, -1} : std::vector<int64_t>{};
    const auto source = std::make_shared<FileSource>(file.path, dtype, drop, start);
    require(source->size() * info(source->dtype()).item_size <= bytes.size(), "no token without its bytes");
    read_all(source, start);
    ++opened;
  } catch (const InputError&) {
    ++refused;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size > 0) open_and_read(data[0], std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
  return 0;
}

#ifndef RMT_LIBFUZZER

namespace {

using Random = std::mt19937_64;

template <size_t N>
const char* any_of(const char* const (&choices)[N], Random& random) {
  return choices[random() % N];
}

std::string valid_file(Random& random) {
  const DTypeInfo& type = kDTypes[random() % 5];
  const size_t count = random() % 40;
  std::string data;
  for (size_t i = 0; i < count * type.item_size; ++i) data += static_cast<char>(random() % 4 ? 0 : random());
  const std::string dict =
      std::string("{'descr': '") + type.npy + "', 'fortran_order': False, 'shape': (" + std::to_string(count) + ",), }";
  return npy(dict, data, 1 + static_cast<int>(random() % 3));
}

constexpr const char* kWords[] = {
    "0",    "1",    "-1",     "(",   ")",   ",",   "{",   "}",     "'",       "\"",  "()",    "18446744073709551615",
    "True", "None", "'shape", "<u8", ">i4", "|u1", "<f4", "(2,3)", "descr':", "\n ", "False", "9223372036854775807",
};

void change(std::string& file, Random& random) {
  const size_t at = file.empty() ? 0 : random() % std::min<size_t>(file.size(), random() % 4 ? 90 : file.size());
  const size_t some = random() % 12;
  switch (file.empty() ? 4 : random() % 7) {
    case 0:
      file[at] = static_cast<char>(random());
      break;
    case 1:
      file[at] = static_cast<char>(file[at] ^ 1 << random() % 8);
      break;
    case 2:
      file.erase(at, some);
      break;
    case 3:
      file.resize(at);
      break;
    case 4:
      file.insert(at, any_of(kWords, random));
      break;
    case 5:
      file.replace(at, some, any_of(kWords, random));
      break;
    case 6:
      file.insert(random() % file.size(), file.substr(at, some));
      break;
  }
}

}  // namespace

// token_file COUNT SEED
int main(int argc, char** argv) {
  const uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10000;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  for (uint64_t i = 0; i < count; ++i) {
    std::string file = valid_file(random);
    for (uint64_t changes = random() % 4; changes-- > 0;) change(file, random);
    const std::string input = static_cast<char>(random() % 4 ? random() & ~uint64_t{1} : random()) + file;
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  }
  std::printf("%llu token files: %llu read, %llu refused\n", static_cast<unsigned long long>(count),
              static_cast<unsigned long long>(opened), static_cast<unsigned long long>(refused));
}

#endif
