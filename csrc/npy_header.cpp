#include "npy_header.hpp"

#include <charconv>
#include <optional>
#include <vector>

namespace rmt {
namespace {

struct Fields {
  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<uint64_t>> shape;
};

// Walks the one Python dict an .npy header is.
class DictParser {
 public:
  DictParser(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Fields parse() {
    expect('{');
    while (!accept('}')) {
      parse_item();
      if (accept(',')) continue;
      expect('}');
      break;
    }
    skip_space();
    if (at_ != text_.size()) fail("nothing after the closing brace");
    return fields_;
  }

 private:
  void parse_item() {
    const std::string key = quoted();
    expect(':');
    if (key == "descr" && !fields_.descr) {
      fields_.descr = quoted();
    } else if (key == "fortran_order" && !fields_.fortran_order) {
      fields_.fortran_order = boolean();
    } else if (key == "shape" && !fields_.shape) {
      fields_.shape = shape();
    } else {
      fail("the keys descr, fortran_order and shape, each once");
    }
  }

  std::string quoted() {
    skip_space();
    const char quote = at_ < text_.size() ? text_[at_] : '\0';
    if (quote != '\'' && quote != '"') fail("a quoted string");
    const size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) fail("a closing quote");
    const std::string_view value = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return std::string(value);
  }

  bool boolean() {
    skip_space();
    for (bool value : {true, false}) {
      const std::string_view word = value ? "True" : "False";
      if (text_.substr(at_, word.size()) != word) continue;
      at_ += word.size();
      return value;
    }
    fail("True or False");
  }

  std::vector<uint64_t> shape() {
    std::vector<uint64_t> sizes;
    expect('(');
    while (!accept(')')) {
      sizes.push_back(number());
      if (accept(',')) continue;
      expect(')');
      break;
    }
    return sizes;
  }

  uint64_t number() {
    skip_space();
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (error != std::errc()) fail("a size that fits 64 bits");
    at_ = static_cast<size_t>(end - text_.data());
    return value;
  }

  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }

  bool accept(char wanted) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  void expect(char wanted) {
    if (!accept(wanted)) fail(std::string("'") + wanted + "'");
  }

  [[noreturn]] void fail(const std::string& expected) const {
    throw InputError(name_ + ": damaged .npy header: expected " + expected + " at byte " + std::to_string(at_) +
                     " of its text; write the file again with numpy.save");
  }

  std::string_view text_;
  const std::string& name_;
  size_t at_ = 0;
  Fields fields_;
};

uint64_t little_endian(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[i]);
  return value;
}

struct TextRange {
  size_t begin, size;
};

// Where the dict lies: magic, version (major, minor), length of the text in 2 bytes (version 1) or 4 (2 and 3).
TextRange find_text(std::string_view start, const std::string& name) {
  if (start.substr(0, kNpyMagic.size()) != kNpyMagic || start.size() < kNpyMagic.size() + 2) {
    throw InputError(name +
                     ": expected an .npy file, and it does not start with the .npy magic; write it with "
                     "numpy.save, or name a raw file .bin and pass dtype");
  }
  const int major = static_cast<unsigned char>(start[6]);
  if (major < 1 || major > 3) {
    throw InputError(name + ": expected .npy version 1, 2 or 3, came " + std::to_string(major) +
                     "; write the file again with numpy.save");
  }
  const size_t length_bytes = major == 1 ? 2 : 4;
  const size_t begin = kNpyMagic.size() + 2 + length_bytes;
  const uint64_t size =
      start.size() < begin ? UINT64_MAX : little_endian(start.substr(begin - length_bytes, length_bytes));
  if (start.size() < begin || size > start.size() - begin) {
    throw InputError(name + ": truncated or damaged .npy header: it ends after the " + std::to_string(start.size()) +
                     " bytes that were read; write the file again with numpy.save");
  }
  return {begin, static_cast<size_t>(size)};
}

std::string shape_text(const std::vector<uint64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

void check_size(const NpyHeader& header, uint64_t file_size, const std::string& name) {
  uint64_t expected = 0;
  if (__builtin_mul_overflow(header.count, info(header.dtype).item_size, &expected) ||
      __builtin_add_overflow(expected, header.data_offset, &expected)) {
    throw InputError(name + ": the .npy header claims " + std::to_string(header.count) +
                     " tokens, more than any file holds; write the file again with numpy.save");
  }
  if (expected == file_size) return;
  throw InputError(name + ": the .npy header claims " + std::to_string(header.count) + " tokens of " +
                   info(header.dtype).name + ": expected a file of " + std::to_string(expected) + " bytes, came " +
                   std::to_string(file_size) + (expected > file_size ? " (truncated)" : " (too long)") +
                   "; copy or write the file again");
}

}  // namespace

NpyHeader parse_npy_header(std::string_view start, uint64_t file_size, const std::string& name) {
  const TextRange range = find_text(start, name);
  const Fields fields = DictParser(start.substr(range.begin, range.size), name).parse();
  if (!fields.descr || !fields.fortran_order || !fields.shape) {
    throw InputError(name +
                     ": damaged .npy header: expected the keys descr, fortran_order and shape; write the file "
                     "again with numpy.save");
  }
  if (fields.shape->size() != 1 || *fields.fortran_order) {
    throw InputError(name + ": expected a 1-D array in C order, came shape " + shape_text(*fields.shape) +
                     (*fields.fortran_order ? " in Fortran order" : "") + "; save array.ravel() instead");
  }
  const auto dtype = find_dtype([&](const DTypeInfo& d) { return *fields.descr == d.npy; });
  if (!dtype) {
    throw InputError(name + ": expected tokens as little-endian " + kDTypeNames + ", came \"" + *fields.descr +
                     "\"; save array.astype(\"<i8\") or a smaller type that fits");
  }
  const NpyHeader header{*dtype, fields.shape->front(), range.begin + range.size};
  check_size(header, file_size, name);
  return header;
}

}  // namespace rmt
