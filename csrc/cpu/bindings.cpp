// The Python module rmt_kernels._cpu: planned linears and the attention of one segment, on plain memory.
//
// Weights are handed over once, as arrays, and checked here. A call gets addresses, since to describe a tensor takes
// longer than many of these calls; rmt_kernels checks shapes, types and strides before.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../dlpack_view.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rmt::cpu {
namespace {

// Shares on the pool, the GIL released.
template <class Args>
void run(void (*kernel)(const Args&, int, int), const Args& args, int threads) {
  struct Call {
    void (*kernel)(const Args&, int, int);
    const Args& args;
  };
  const Call call{kernel, args};
  const py::gil_scoped_release released;
  run_shares(
      threads,
      [](void* context, int part, int parts) {
        const Call& call = *static_cast<const Call*>(context);
        call.kernel(call.args, part, parts);
      },
      const_cast<Call*>(&call));
}

template <class T>
T* at(intptr_t address) {
  return reinterpret_cast<T*>(address);
}

TensorView floats(py::handle array, const char* name, size_t dimensions) {
  TensorView view = view_array(array);
  const bool plain = view.dtype.code == dlpack::kFloat && view.dtype.bits == 32 && view.dtype.lanes == 1;
  if (!plain || view.device.type != dlpack::kCPU || view.shape.size() != dimensions || !view.contiguous()) {
    throw ArgumentError(std::string(name) + ": expected contiguous float32 of " + std::to_string(dimensions) +
                        " dimensions on the CPU, came " + type_name(view.dtype) + " of " +
                        std::to_string(view.shape.size()) + (view.contiguous() ? "" : ", not contiguous"));
  }
  return view;
}

// A copy of an optional vector of known length; empty where there is none.
std::vector<float> vector_of(const py::object& array, const char* name, int64_t length) {
  if (array.is_none()) return {};
  const TensorView view = floats(array, name, 1);
  if (view.shape[0] != length) {
    throw ArgumentError(std::string(name) + ": expected " + std::to_string(length) + " elements, came " +
                        std::to_string(view.shape[0]));
  }
  const auto* data = reinterpret_cast<const float*>(view.data);
  return {data, data + length};
}

template <class Enum>
Enum named(const std::string& name, const char* what, std::initializer_list<std::pair<const char*, Enum>> values) {
  std::string names;
  for (const auto& [known, value] : values) {
    if (name == known) return value;
    names += std::string(names.empty() ? "" : ", ") + known;
  }
  throw ArgumentError(std::string(what) + ": expected one of " + names + ", came \"" + name + "\"");
}

// act(norm(x) Wᵀ + b) with its weight packed for one instruction set.
class Linear {
 public:
  Linear(const py::object& weight, const py::object& bias, const std::string& norm, const py::object& norm_weight,
         const py::object& norm_bias, float eps, const std::string& activation, const std::string& kernels)
      : kernels_(choose_kernels(kernels)) {
    const TensorView view = floats(weight, "weight", 2);
    args_.outputs = view.shape[0];
    args_.inputs = view.shape[1];
    args_.norm = named<NormKind>(norm, "norm",
                                 {{"none", NormKind::kNone}, {"layer", NormKind::kLayer}, {"rms", NormKind::kRms}});
    args_.activation = named<Activation>(activation, "activation",
                                         {{"none", Activation::kNone},
                                          {"gelu", Activation::kGelu},
                                          {"gelu_tanh", Activation::kGeluTanh},
                                          {"relu", Activation::kRelu},
                                          {"silu", Activation::kSilu},
                                          {"tanh", Activation::kTanh}});
    args_.eps = eps;
    bias_ = vector_of(bias, "bias", args_.outputs);
    norm_weight_ = vector_of(norm_weight, "norm_weight", args_.inputs);
    norm_bias_ = vector_of(norm_bias, "norm_bias", args_.inputs);
    if ((args_.norm == NormKind::kNone) != norm_weight_.empty()) {
      throw ArgumentError("norm_weight: expected one with a norm, and none without");
    }
    const int64_t panel = kernels_.panel, padded = (args_.outputs + panel - 1) / panel * panel;
    const size_t bytes = (static_cast<size_t>(padded * args_.inputs) * sizeof(float) + 63) / 64 * 64;
    packed_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!packed_) throw std::bad_alloc();
    const auto* from = reinterpret_cast<const float*>(view.data);
    const py::gil_scoped_release released;
    kernels_.pack(from, args_.outputs, args_.inputs, args_.inputs, packed_.get());
  }

  // x [rows, inputs] at an address, its rows x_stride elements apart -> out [rows, outputs], contiguous. `other` is
  // added to it or multiplied with it.
  void call(intptr_t x, int64_t rows, int64_t x_stride, const std::string& combine, intptr_t other,
            int64_t other_stride, intptr_t out, int threads) const {
    LinearArgs args = args_;
    args.weight = packed_.get();
    args.bias = bias_.empty() ? nullptr : bias_.data();
    args.norm_weight = norm_weight_.data();
    args.norm_bias = norm_bias_.empty() ? nullptr : norm_bias_.data();
    args.x = at<const float>(x);
    args.rows = rows;
    args.x_stride = x_stride;
    args.combine = named<Combine>(combine, "combine",
                                  {{"none", Combine::kNone}, {"add", Combine::kAdd}, {"multiply", Combine::kMultiply}});
    args.other = at<const float>(other);
    args.other_stride = other_stride;
    args.out = at<float>(out);
    args.out_stride = args.outputs;
    run(kernels_.linear, args, threads);
  }

 private:
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };

  const Kernels& kernels_;
  LinearArgs args_{};
  std::unique_ptr<float, Free> packed_;
  std::vector<float> bias_, norm_weight_, norm_bias_;
};

Storage storage_of(const std::string& dtype) {
  return named<Storage>(
      dtype, "dtype",
      {{"float32", Storage::kFloat32}, {"bfloat16", Storage::kBfloat16}, {"float16", Storage::kFloat16}});
}

// A number for every slot, or (address of int32 [batch], what is added to each).
Count count_of(const py::handle& value) {
  if (!py::isinstance<py::tuple>(value)) return {nullptr, value.cast<int64_t>()};
  const auto pair = py::reinterpret_borrow<py::tuple>(value);
  return {at<const int32_t>(pair[0].cast<intptr_t>()), pair[1].cast<int64_t>()};
}

// Rows of heads at an address: elements from slot to slot, from head to head and from row to row.
struct Heads {
  intptr_t address;
  int64_t batch, head, row;
};

// The attention of one layer; what it computes is said in rmt_kernels.segment_attention.
class Attention {
 public:
  Attention(int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal, float scale, const py::object& cos,
            const py::object& sin, const std::string& kernels)
      : kernels_(choose_kernels(kernels)) {
    if (head_dim < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads != 0) {
      throw ArgumentError("heads: expected a multiple of kv_heads, came " + std::to_string(heads) + " and " +
                          std::to_string(kv_heads));
    }
    args_.heads = heads;
    args_.kv_heads = kv_heads;
    args_.head_dim = head_dim;
    args_.causal = causal;
    args_.scale = scale;
    if (cos.is_none() != sin.is_none()) throw ArgumentError("cos and sin: expected both or neither");
    if (!cos.is_none()) {
      args_.cos = table(cos, "cos");
      args_.sin = table(sin, "sin");
    }
  }

  // q [batch, rows, heads · head_dim] -> out, contiguous; k and v hold all keys and values, rotated if from a cache.
  void call(const std::string& dtype, int64_t batch, int64_t rows, const Heads& q, const Heads& k, const Heads& v,
            bool cached, const py::object& past, const py::object& start, const py::object& length, intptr_t out,
            int threads) const {
    AttentionArgs args = args_;
    args.storage = storage_of(dtype);
    args.batch = batch;
    args.rows = rows;
    args.q = at<const void>(q.address);
    args.q_batch = q.batch;
    args.q_row = q.row;
    args.k = at<const void>(k.address);
    args.k_batch = k.batch;
    args.k_head = k.head;
    args.k_row = k.row;
    args.v = at<const void>(v.address);
    args.v_batch = v.batch;
    args.v_head = v.head;
    args.v_row = v.row;
    args.past = count_of(past);
    args.start = count_of(start);
    args.length = count_of(length);
    args.rotate_keys = args.cos && !cached;
    args.out = at<void>(out);
    run(kernels_.attention, args, threads);
  }

  // The first `length` rows of k and v -> a cache's keys and values, behind the `past` rows of each slot.
  void append(const std::string& dtype, int64_t batch, const Heads& k, const Heads& v, const Heads& keys,
              const Heads& values, const py::object& past, const py::object& length, int threads) const {
    AppendArgs args{};
    args.storage = storage_of(dtype);
    args.batch = batch;
    args.kv_heads = args_.kv_heads;
    args.head_dim = args_.head_dim;
    args.k = at<const void>(k.address);
    args.k_batch = k.batch;
    args.k_row = k.row;
    args.v = at<const void>(v.address);
    args.v_batch = v.batch;
    args.v_row = v.row;
    args.keys = at<void>(keys.address);
    args.keys_batch = keys.batch;
    args.keys_head = keys.head;
    args.keys_row = keys.row;
    args.values = at<void>(values.address);
    args.values_batch = values.batch;
    args.values_head = values.head;
    args.values_row = values.row;
    args.past = count_of(past);
    args.length = count_of(length);
    args.cos = args_.cos;
    args.sin = args_.sin;
    run(kernels_.append, args, threads);
  }

 private:
  const float* table(const py::object& array, const char* name) {
    tables_.push_back(floats(array, name, 2));
    if (tables_.back().shape[1] != args_.head_dim) {
      throw ArgumentError(std::string(name) + ": expected [positions, " + std::to_string(args_.head_dim) + "]");
    }
    return reinterpret_cast<const float*>(tables_.back().data);
  }

  const Kernels& kernels_;
  AttentionArgs args_{};
  std::vector<TensorView> tables_;  // kept alive: every layer of a model looks at the same ones
};

}  // namespace
}  // namespace rmt::cpu

// Heads come as a tuple of their four numbers.
namespace pybind11::detail {
template <>
struct type_caster<rmt::cpu::Heads> {
  PYBIND11_TYPE_CASTER(rmt::cpu::Heads, const_name("tuple[int, int, int, int]"));
  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    int64_t all[4];
    for (int i = 0; i < 4; ++i) {
      all[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i));
      if (all[i] == -1 && PyErr_Occurred()) throw error_already_set();
    }
    value = {static_cast<intptr_t>(all[0]), all[1], all[2], all[3]};
    return true;
  }
};
}  // namespace pybind11::detail

PYBIND11_MODULE(_cpu, m) {
  using namespace rmt::cpu;
  m.doc() = "Linears and attention of a segment on a CPU, for the instruction set it has.";
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
        return names;
      },
      "Those that are compiled in and that this CPU has, the fastest first.");
  m.def("thread_pool", &pool_name, "The OpenMP runtime whose threads are used; empty where torch's was not found.");
  py::class_<Linear>(m, "Linear", "act(norm(x) Wᵀ + b) in fp32, its weight packed.")
      .def(py::init<const py::object&, const py::object&, const std::string&, const py::object&, const py::object&,
                    float, const std::string&, const std::string&>(),
           "weight"_a, "bias"_a = py::none(), "norm"_a = "none", "norm_weight"_a = py::none(),
           "norm_bias"_a = py::none(), "eps"_a = 0.0f, "activation"_a = "none", "instruction_set"_a = "auto")
      .def("__call__", &Linear::call, "x"_a, "rows"_a, "x_stride"_a, "combine"_a, "other"_a, "other_stride"_a, "out"_a,
           "threads"_a);
  py::class_<Attention>(m, "Attention", "softmax(q kᵀ · scale + mask) v of one layer.")
      .def(py::init<int64_t, int64_t, int64_t, bool, float, const py::object&, const py::object&, const std::string&>(),
           "heads"_a, "kv_heads"_a, "head_dim"_a, "causal"_a, "scale"_a, "cos"_a = py::none(), "sin"_a = py::none(),
           "instruction_set"_a = "auto")
      .def("__call__", &Attention::call, "dtype"_a, "batch"_a, "rows"_a, "q"_a, "k"_a, "v"_a, "cached"_a, "past"_a,
           "start"_a, "length"_a, "out"_a, "threads"_a)
      .def("append", &Attention::append, "dtype"_a, "batch"_a, "k"_a, "v"_a, "keys"_a, "values"_a, "past"_a, "length"_a,
           "threads"_a);
}
