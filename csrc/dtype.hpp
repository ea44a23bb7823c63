// The integer types tokens come in, and widening them to the int64 that everything else uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "errors.hpp"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token files are little-endian and read as they lie");

namespace rmt {

enum class DType { kUint8, kUint16, kUint32, kInt32, kInt64 };

inline constexpr const char* kDTypeNames = "uint8, uint16, uint32, int32 or int64";

struct DTypeInfo {
  DType dtype;
  const char* name;
  const char* npy;  // as an .npy header spells it
  size_t item_size;
  bool is_signed;
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::kUint8, "uint8", "|u1", 1, false},   {DType::kUint16, "uint16", "<u2", 2, false},
    {DType::kUint32, "uint32", "<u4", 4, false}, {DType::kInt32, "int32", "<i4", 4, true},
    {DType::kInt64, "int64", "<i8", 8, true},
};

inline const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<size_t>(dtype)]; }

template <class Matches>
std::optional<DType> find_dtype(Matches matches) {
  for (const DTypeInfo& candidate : kDTypes) {
    if (matches(candidate)) return candidate.dtype;
  }
  return std::nullopt;
}

inline DType dtype_from_name(std::string_view name) {
  if (auto dtype = find_dtype([&](const DTypeInfo& d) { return name == d.name; })) return *dtype;
  throw ArgumentError("dtype: expected " + std::string(kDTypeNames) + ", came \"" + std::string(name) +
                      "\"; name the type the tokens were written with");
}

namespace detail {

template <class T>
void widen_from(const char* data, size_t count, int64_t* out) {
  for (size_t i = 0; i < count; ++i) {
    T value;  // memcpy, because a caller's buffer may start at any address
    std::memcpy(&value, data + i * sizeof(T), sizeof(T));
    out[i] = static_cast<int64_t>(value);
  }
}

}  // namespace detail

inline void widen(const void* data, DType dtype, size_t count, int64_t* out) {
  const char* bytes = static_cast<const char*>(data);
  switch (dtype) {
    case DType::kUint8:
      return detail::widen_from<uint8_t>(bytes, count, out);
    case DType::kUint16:
      return detail::widen_from<uint16_t>(bytes, count, out);
    case DType::kUint32:
      return detail::widen_from<uint32_t>(bytes, count, out);
    case DType::kInt32:
      return detail::widen_from<int32_t>(bytes, count, out);
    case DType::kInt64:
      return detail::widen_from<int64_t>(bytes, count, out);
  }
}

}  // namespace rmt
