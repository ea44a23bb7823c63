// The Python module rmt_engine._C: its classes, the checks of their arguments, and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <string>
#include <vector>

#include "dlpack_view.hpp"
#include "segment_stream.hpp"
#include "token_source.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rmt {
namespace {

// Python runs signal handlers in its main thread only; the others need not take the GIL to learn of no signal, which
// would also be unsafe for a daemon thread while the interpreter ends.
Poll signal_poll() {
  static const auto main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  if (PyThread_get_thread_ident() != main_thread) return {};
  return [] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

// A file name need not be UTF-8, so the message is decoded the way Python decodes file names.
void set_input_error(const char* message) {
  const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(message));
  const py::object type = py::module_::import("rmt_engine.errors").attr("InputError");
  PyErr_SetObject(type.ptr(), text.ptr());
}

void register_errors(py::module_& m) {
  py::module_::import("rmt_engine.errors");  // fails here rather than at the first bad input
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InputError& e) {
      set_input_error(e.what());
    }
  });
  const py::object base = py::module_::import("rmt_engine.errors").attr("RMTError");
  py::register_exception<Stopped>(m, "StreamStopped", base).attr("__doc__") =
      "The stream was stopped while, or before, this call waited.";
}

// Python's integers have a sign; ours say what came instead of "incompatible arguments".
size_t positive(py::ssize_t value, const char* name) {
  if (value >= 1) return static_cast<size_t>(value);
  throw ArgumentError(std::string(name) + ": expected at least 1, came " + std::to_string(value));
}

std::shared_ptr<FileSource> open_source(const std::filesystem::path& path, const std::string& dtype,
                                        const std::vector<int64_t>& drop_ids) {
  std::optional<DType> named;
  if (dtype != "auto") named = dtype_from_name(dtype);
  const py::gil_scoped_release release;
  return std::make_shared<FileSource>(path.string(), named, drop_ids);
}

std::shared_ptr<PushedSource> pushed_source(const std::vector<int64_t>& drop_ids, py::ssize_t capacity) {
  return std::make_shared<PushedSource>(drop_ids, positive(capacity, "capacity"));
}

uint64_t count_tokens(TokenSource& source) {
  const Poll poll = signal_poll();
  const py::gil_scoped_release release;
  return source.count(poll);
}

void push(PushedSource& source, const void* data, DType dtype, size_t count) {
  const Poll poll = signal_poll();
  const py::gil_scoped_release release;
  source.push(data, dtype, count, poll);
}

void push_list(PushedSource& source, const std::vector<int64_t>& ids) {
  push(source, ids.data(), DType::kInt64, ids.size());
}

void push_array(PushedSource& source, const py::object& ids) {
  constexpr const char* kWanted = "push(ids): expected a 1-D array or list of integers, came ";
  if (!py::hasattr(ids, "__dlpack__") && (!PyObject_CheckBuffer(ids.ptr()) || PyBytes_Check(ids.ptr()))) {
    throw ArgumentError(kWanted + std::string(py::str(py::type::handle_of(ids).attr("__name__"))) +
                        "; tokenize text first");
  }
  const TensorView view = view_array(ids);
  if (view.device.type != dlpack::kCPU && view.device.type != dlpack::kCUDAHost) {
    throw ArgumentError(std::string(kWanted) + "one on a device; move it with .cpu()");
  }
  const auto dtype = integer_dtype(view.dtype);
  if (!dtype) {
    throw ArgumentError(kWanted + type_name(view.dtype) + "; convert it to one of " + kDTypeNames);
  }
  if (view.shape.size() != 1 || !view.contiguous()) {
    throw ArgumentError(kWanted + std::to_string(view.shape.size()) + "-D" +
                        (view.contiguous() ? "" : ", not contiguous") + "; push one contiguous row at a time");
  }
  push(source, view.data, *dtype, static_cast<size_t>(view.shape[0]));
}

std::unique_ptr<SegmentStream> make_stream(std::shared_ptr<TokenSource> source, py::ssize_t segment_size,
                                           std::optional<py::ssize_t> first_segment_size, py::ssize_t ring_slots,
                                           std::optional<int64_t> vocab_size) {
  StreamOptions options;
  options.segment_size = positive(segment_size, "segment_size");
  options.first_segment_size = positive(first_segment_size.value_or(segment_size), "first_segment_size");
  options.ring_slots = positive(ring_slots, "ring_slots");
  options.vocab_size = vocab_size;
  return std::make_unique<SegmentStream>(std::move(source), options);
}

std::optional<Segment> next_segment(SegmentStream& stream) {
  const Poll poll = signal_poll();
  const py::gil_scoped_release release;
  return stream.next(poll);
}

Segment iterate(SegmentStream& stream) {
  if (auto segment = next_segment(stream)) return *segment;
  throw py::stop_iteration();
}

void stop(SegmentStream& stream) {
  const py::gil_scoped_release release;
  stream.stop();
}

py::dict stats(const SegmentStream& stream) {
  const StreamStats now = stream.stats();
  return py::dict("segments"_a = now.segments, "tokens"_a = now.tokens,
                  "reader_wait_seconds"_a = now.reader_wait_seconds,
                  "consumer_wait_seconds"_a = now.consumer_wait_seconds);
}

py::array_t<int64_t> segment_ids(const py::object& self) {
  const auto& segment = self.cast<const Segment&>();
  if (!segment.valid()) {
    throw ArgumentError("segment " + std::to_string(segment.index) +
                        ": its ids were valid until the following next(); copy them before");
  }
  const auto size = static_cast<py::ssize_t>(segment.size);
  return py::array_t<int64_t>(size, segment.ids, self);  // the array's base keeps the slots alive
}

std::string segment_repr(const Segment& segment) {
  return "Segment(index=" + std::to_string(segment.index) + ", position=" + std::to_string(segment.position) +
         ", size=" + std::to_string(segment.size) + ", last=" + (segment.last ? "True" : "False") + ")";
}

void bind_sources(py::module_& m) {
  py::class_<TokenSource, std::shared_ptr<TokenSource>> source(m, "TokenSource");
  py::class_<FileSource, TokenSource, std::shared_ptr<FileSource>>(m, "FileSource")
      .def_property_readonly("dtype", [](const FileSource& s) { return info(s.dtype()).name; });
  py::class_<PushedSource, TokenSource, std::shared_ptr<PushedSource>>(m, "PushedSource")
      .def("push", &push_list, "ids"_a.noconvert())
      .def("push", &push_array, "ids"_a)
      .def("close", &PushedSource::close, py::call_guard<py::gil_scoped_release>())
      .def("fail", &PushedSource::fail, "message"_a, py::call_guard<py::gil_scoped_release>());
  source.def_static("open", &open_source, "path"_a, "dtype"_a = "auto", "drop_ids"_a = py::tuple())
      .def_static("pushed", &pushed_source, "drop_ids"_a = py::tuple(), "capacity"_a = 1 << 20)
      .def_property_readonly("size", &TokenSource::size)
      .def("count", &count_tokens);
}

void bind_stream(py::module_& m) {
  py::class_<Segment>(m, "Segment")
      .def_property_readonly("ids", &segment_ids)
      .def_readonly("index", &Segment::index)
      .def_readonly("position", &Segment::position)
      .def_readonly("last", &Segment::last)
      .def("__len__", [](const Segment& s) { return s.size; })
      .def("__repr__", &segment_repr);
  py::class_<SegmentStream>(m, "SegmentStream")
      .def(py::init(&make_stream), "source"_a, "segment_size"_a, "first_segment_size"_a = py::none(),
           "ring_slots"_a = 8, "vocab_size"_a = py::none())
      .def("next", &next_segment)
      .def("stop", &stop)
      .def("stats", &stats)
      .def("__iter__", [](py::object self) { return self; })
      .def("__next__", &iterate)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](SegmentStream& stream, const py::args&) { stop(stream); });
}

}  // namespace
}  // namespace rmt

PYBIND11_MODULE(_C, m) {
  m.doc() = "Token files and pushed tokens, cut into segments ahead of the compute.";
  rmt::register_errors(m);
  rmt::bind_sources(m);
  rmt::bind_stream(m);
}
