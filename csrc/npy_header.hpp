// The header of an .npy file, read as strictly as it is written: what it says must be what the file holds.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "dtype.hpp"

namespace rmt {

struct NpyHeader {
  DType dtype;
  uint64_t count;        // tokens
  uint64_t data_offset;  // bytes
};

inline constexpr std::string_view kNpyMagic{"\x93NUMPY", 6};

// A 1-D header takes 128 bytes; a longer text than this is damage, not data.
inline constexpr size_t kNpyMaxHeader = 65536;

// `start`: the first bytes of the file (12 + kNpyMaxHeader, or all of it). Throws InputError; `name` opens the message.
NpyHeader parse_npy_header(std::string_view start, uint64_t file_size, const std::string& name);

}  // namespace rmt
