// Arrays that callers hand in, through DLPack or the buffer protocol, as a checked view of {pointer, shape, dtype,
// device}. Needs the GIL, to make a view and to let one go.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dtype.hpp"
#include "errors.hpp"

namespace rmt {

namespace py = pybind11;

// The structures of DLPack (dmlc.github.io/dlpack), whose layout is its ABI.
namespace dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, id;
};

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when contiguous
  uint64_t byte_offset;
};

struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

}  // namespace dlpack

struct TensorView {
  const char* data;
  std::vector<int64_t> shape, strides;  // strides in elements
  dlpack::Type dtype;
  dlpack::Device device;
  std::shared_ptr<void> owner;

  bool contiguous() const {
    int64_t expected = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      if (shape[i] > 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

namespace detail {

inline TensorView view_tensor(const dlpack::Tensor& tensor, std::shared_ptr<void> owner) {
  TensorView view{static_cast<const char*>(tensor.data), {}, {}, tensor.dtype, tensor.device, std::move(owner)};
  if (view.data) view.data += tensor.byte_offset;
  view.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides) {
    view.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  } else {
    int64_t stride = 1;
    view.strides.resize(view.shape.size());
    for (size_t i = view.shape.size(); i-- > 0; stride *= view.shape[i]) view.strides[i] = stride;
  }
  return view;
}

// Taking the tensor out of its capsule makes us the one who calls its deleter; the new name says so.
template <class Managed>
Managed* take_from_capsule(py::handle capsule, const char* name, const char* used_name) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (!managed || PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();
  return managed;
}

template <class Managed>
std::shared_ptr<void> own(Managed* managed) {
  return {managed, [](Managed* m) {
            if (m->deleter) m->deleter(m);
          }};
}

inline py::object export_capsule(py::handle array) {
  try {
    return array.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return array.attr("__dlpack__")();  // written before DLPack had versions
  }
}

inline std::optional<dlpack::Type> type_from_format(const std::string& format, py::ssize_t item_size) {
  if (format.empty() || format[0] == '>' || format[0] == '!') return std::nullopt;
  const std::string letter = format.substr(format.find_first_not_of("@=<") == 1 ? 1 : 0);
  const auto bits = static_cast<uint8_t>(item_size * 8);
  if (letter.size() != 1) return std::nullopt;
  if (std::string("bhilqn").find(letter) != std::string::npos) return dlpack::Type{dlpack::kInt, bits, 1};
  if (std::string("BHILQN").find(letter) != std::string::npos) return dlpack::Type{dlpack::kUInt, bits, 1};
  if (std::string("efd").find(letter) != std::string::npos) return dlpack::Type{dlpack::kFloat, bits, 1};
  if (letter == "?") return dlpack::Type{dlpack::kBool, bits, 1};
  return std::nullopt;
}

}  // namespace detail

inline TensorView view_capsule(py::handle capsule) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed =
        detail::take_from_capsule<dlpack::ManagedVersioned>(capsule, "dltensor_versioned", "used_dltensor_versioned");
    auto owner = detail::own(managed);
    // Past the version, another major release may lay out everything differently.
    if (managed->major != 1) throw ArgumentError("expected DLPack 1.x, came " + std::to_string(managed->major) + ".x");
    return detail::view_tensor(managed->tensor, std::move(owner));
  }
  auto* managed = detail::take_from_capsule<dlpack::Managed>(capsule, "dltensor", "used_dltensor");
  return detail::view_tensor(managed->tensor, detail::own(managed));
}

inline TensorView view_buffer(py::handle array) {
  auto* info = new py::buffer_info(py::reinterpret_borrow<py::buffer>(array).request());
  std::shared_ptr<void> owner(info, [](py::buffer_info* i) { delete i; });
  const auto type = detail::type_from_format(info->format, info->itemsize);
  if (!type || info->itemsize < 1)
    throw ArgumentError("expected a buffer of native integers, came format \"" + info->format + "\"");
  TensorView view{static_cast<const char*>(info->ptr), {}, {}, *type, {dlpack::kCPU, 0}, std::move(owner)};
  for (size_t i = 0; i < info->shape.size(); ++i) {
    // A field of a struct array, say: its elements lie at no multiple of their size.
    if (info->strides[i] % info->itemsize != 0) throw ArgumentError("expected a contiguous buffer, came a strided one");
    view.shape.push_back(info->shape[i]);
    view.strides.push_back(info->strides[i] / info->itemsize);
  }
  return view;
}

// DLPack first, since every array library has it; a library that refuses to export a read-only array may still lend
// its buffer.
inline TensorView view_array(py::handle array) {
  const bool has_buffer = PyObject_CheckBuffer(array.ptr());
  if (py::hasattr(array, "__dlpack__")) {
    try {
      return view_capsule(detail::export_capsule(array));
    } catch (py::error_already_set& error) {
      if (!has_buffer || !error.matches(PyExc_BufferError)) throw;
    }
  }
  if (has_buffer) return view_buffer(array);
  throw ArgumentError("expected an array, came " + std::string(py::str(py::type::handle_of(array).attr("__name__"))));
}

inline std::string type_name(dlpack::Type type) {
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUInt:
      return "uint" + bits;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kBool:
      return "bool";
    default:
      return "DLPack type " + std::to_string(type.code);
  }
}

inline std::optional<DType> integer_dtype(dlpack::Type type) {
  if (type.lanes != 1 || (type.code != dlpack::kInt && type.code != dlpack::kUInt)) return std::nullopt;
  return find_dtype(
      [&](const DTypeInfo& d) { return d.item_size * 8 == type.bits && d.is_signed == (type.code == dlpack::kInt); });
}

}  // namespace rmt
