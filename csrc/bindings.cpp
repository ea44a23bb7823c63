// The Python module rmt_engine._C: its classes, the checks of their arguments, and nothing else.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "dlpack_view.hpp"
#include "graph_runner.hpp"
#include "host_driver.hpp"
#include "segment_stream.hpp"
#include "token_source.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace rmt {
namespace {

// Set as the module loads: a lazy static that runs Python could deadlock between its own lock and the GIL.
unsigned long main_thread = 0;

void remember_main_thread() {
  main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
}

// Work without the GIL. A thread that asks for it back while the interpreter ends is told to exit by unwinding, which
// would cross our destructors and abort; it sleeps instead, until the process is gone, as Python 3.14 lets it.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      while (true) ::pause();
    }
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* const state_;
};

// A fork copies no threads, and locks as they happen to be: what a thread of the parent may have been using cannot even
// be destroyed in the child, so it is left lying.
struct LeftInChild {
  pid_t owner = ::getpid();
  template <class T>
  void operator()(T* object) const {
    if (::getpid() == owner) delete object;
  }
};

// Python runs signal handlers in its main thread only; the others need not take the GIL to learn of no signal, which
// would also be unsafe for a daemon thread while the interpreter ends.
Poll signal_poll() {
  if (PyThread_get_thread_ident() != main_thread) return {};
  return [] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

// A file name need not be UTF-8, so the message is decoded the way Python decodes file names.
void set_error(const char* type_name, const char* message) {
  const auto text = py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefault(message));
  const py::object type = py::module_::import("rmt_engine.errors").attr(type_name);
  PyErr_SetObject(type.ptr(), text.ptr());
}

void register_errors(py::module_& m) {
  py::module_::import("rmt_engine.errors");  // fails here rather than at the first bad input
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const InputError& e) {
      set_error("InputError", e.what());
    } catch (const cuda::DriverMissing& e) {
      set_error("BackendError", e.what());
    } catch (const cuda::CudaOutOfMemory& e) {
      set_error("DeviceOutOfMemory", e.what());
    } catch (const cuda::CudaError& e) {
      set_error("DeviceError", e.what());
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

std::string class_name(py::handle object) { return py::str(py::type::handle_of(object).attr("__name__")); }

std::vector<int64_t> integers(const py::iterable& values, const std::string& name) {
  std::vector<int64_t> out;
  for (const py::handle value : values) {
    try {
      out.push_back(value.cast<int64_t>());
    } catch (const py::cast_error&) {
      throw ArgumentError(name + ": expected integers of 64 bits, came " + std::string(py::repr(value)));
    }
  }
  return out;
}

std::shared_ptr<FileSource> open_source(const std::filesystem::path& path, const std::string& dtype,
                                        const py::iterable& drop_ids, int64_t start) {
  if (start < 0) throw ArgumentError("start: expected 0 or more, came " + std::to_string(start));
  std::optional<DType> named;
  if (dtype != "auto") named = dtype_from_name(dtype);
  const auto dropped = integers(drop_ids, "drop_ids");
  const GilReleased released;
  return std::make_shared<FileSource>(path.string(), named, dropped, static_cast<uint64_t>(start));
}

std::shared_ptr<PushedSource> pushed_source(const py::iterable& drop_ids, py::ssize_t capacity) {
  auto* source = new PushedSource(integers(drop_ids, "drop_ids"), positive(capacity, "capacity"));
  return {source, LeftInChild{}};
}

uint64_t count_tokens(TokenSource& source) {
  const Poll poll = signal_poll();
  const GilReleased released;
  return source.count(poll);
}

void push_tokens(PushedSource& source, const void* data, DType dtype, size_t count) {
  const Poll poll = signal_poll();
  const GilReleased released;
  source.push(data, dtype, count, poll);
}

void push_array(PushedSource& source, const py::object& ids) {
  const std::string wanted = "push(ids): expected a 1-D array or list of integers, came ";
  const bool is_array = py::hasattr(ids, "__dlpack__") || PyObject_CheckBuffer(ids.ptr());
  if (!is_array || PyBytes_Check(ids.ptr()) || PyByteArray_Check(ids.ptr())) {
    throw ArgumentError(wanted + class_name(ids) + "; tokenize text first");
  }
  const TensorView view = view_array(ids);
  if (view.device.type != dlpack::kCPU && view.device.type != dlpack::kCUDAHost) {
    throw ArgumentError(wanted + "one on a device; move it with .cpu()");
  }
  const auto dtype = integer_dtype(view.dtype);
  if (!dtype) {
    throw ArgumentError(wanted + type_name(view.dtype) + "; convert it to one of " + kDTypeNames);
  }
  if (view.shape.size() != 1 || !view.contiguous()) {
    throw ArgumentError(wanted + "one of " + std::to_string(view.shape.size()) + " dimensions" +
                        (view.contiguous() ? "" : ", not contiguous") + "; push one contiguous row at a time");
  }
  push_tokens(source, view.data, *dtype, static_cast<size_t>(view.shape[0]));
}

void push(PushedSource& source, const py::object& ids) {
  if (!py::isinstance<py::list>(ids) && !py::isinstance<py::tuple>(ids)) return push_array(source, ids);
  const auto tokens = integers(ids, "push(ids)");
  push_tokens(source, tokens.data(), DType::kInt64, tokens.size());
}

using StreamHolder = std::unique_ptr<SegmentStream, LeftInChild>;

StreamHolder make_stream(std::shared_ptr<TokenSource> source, py::ssize_t segment_size,
                         std::optional<py::ssize_t> first_segment_size, py::ssize_t ring_slots,
                         std::optional<int64_t> vocab_size) {
  StreamOptions options;
  options.segment_size = positive(segment_size, "segment_size");
  options.first_segment_size = positive(first_segment_size.value_or(segment_size), "first_segment_size");
  options.ring_slots = positive(ring_slots, "ring_slots");
  options.vocab_size = vocab_size;
  return StreamHolder(new SegmentStream(std::move(source), options));
}

std::optional<Segment> next_segment(SegmentStream& stream) {
  const Poll poll = signal_poll();
  const GilReleased released;
  return stream.next(poll);
}

Segment iterate(SegmentStream& stream) {
  if (auto segment = next_segment(stream)) return *segment;
  throw py::stop_iteration();
}

void stop(SegmentStream& stream) {
  const GilReleased released;
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
  py::class_<TokenSource, std::shared_ptr<TokenSource>> source(
      m, "TokenSource", "Where tokens come from: TokenSource.open(path) or TokenSource.pushed().");
  py::class_<FileSource, TokenSource, std::shared_ptr<FileSource>>(
      m, "FileSource", "A token file. Any number of streams may read it, each from `start`.")
      .def_property_readonly("dtype", [](const FileSource& s) { return info(s.dtype()).name; });
  py::class_<PushedSource, TokenSource, std::shared_ptr<PushedSource>>(
      m, "PushedSource", "A bounded queue: other threads push, one stream reads.")
      .def("push", &push, "ids"_a,
           "Adds a 1-D integer array or list; waits while the queue is full. Raises ValueError after close() or\n"
           "fail(), StreamStopped once the stream that reads has stopped.")
      .def("close", &PushedSource::close, py::call_guard<GilReleased>(), "The input ends here.")
      .def("fail", &PushedSource::fail, "message"_a, py::call_guard<GilReleased>(),
           "The input ends here, and the stream raises InputError(message) after the whole segments before it.");
  source
      .def_static("open", &open_source, "path"_a, "dtype"_a = "auto", "drop_ids"_a = py::tuple(), "start"_a = 0,
                  "Opens a 1-D .npy file, or a raw little-endian file, which needs a dtype; streams begin at its\n"
                  "token `start`, counted before dropping.")
      .def_static("pushed", &pushed_source, "drop_ids"_a = py::tuple(), "capacity"_a = 1 << 20,
                  "Makes a queue of at most `capacity` tokens.")
      .def_property_readonly("size", &TokenSource::size, "Tokens of the whole file, before dropping.")
      .def("count", &count_tokens, "Tokens from `start` on, after dropping: reads them if there is anything to drop.");
}

void bind_stream(py::module_& m) {
  py::class_<Segment>(m, "Segment")
      .def_property_readonly("ids", &segment_ids, "int64 [size], a view that is valid until the following next().")
      .def_readonly("index", &Segment::index)
      .def_readonly("position", &Segment::position, "Tokens before it, after dropping.")
      .def_readonly("last", &Segment::last, "True when no token follows.")
      .def("__len__", [](const Segment& s) { return s.size; })
      .def("__repr__", &segment_repr);
  py::class_<SegmentStream, StreamHolder>(m, "SegmentStream",
                                          "Cuts a source into segments, read ahead by a thread of its own.")
      .def(py::init(&make_stream), "source"_a, "segment_size"_a, "first_segment_size"_a = py::none(),
           "ring_slots"_a = 8, "vocab_size"_a = py::none())
      .def("next", &next_segment, "Waits for the next segment; None at the end of the input.")
      .def("stop", &stop, "Ends the stream, from any thread; who waits in next() gets StreamStopped.")
      .def("stats", &stats, "segments, tokens (handed out), reader_wait_seconds, consumer_wait_seconds")
      .def("__iter__", [](py::object self) { return self; })
      .def("__next__", &iterate)
      .def("__enter__", [](py::object self) { return self; })
      .def("__exit__", [](SegmentStream& stream, const py::args&) { stop(stream); });
}

using RunnerHolder = std::unique_ptr<GraphRunner, LeftInChild>;

const cuda::DriverTable& driver_of(const std::string& name) {
  if (name == "cuda") return cuda::driver();
  if (name == "host") return cuda::host_driver();
  throw ArgumentError("driver: expected 'cuda' or 'host', came '" + name + "'");
}

RunnerHolder make_runner(const std::string& driver, const std::vector<std::pair<size_t, py::ssize_t>>& graphs,
                         py::ssize_t segment_size, py::ssize_t piece_segments, size_t ids, size_t lengths,
                         size_t counter, size_t finite, const std::vector<std::pair<size_t, py::ssize_t>>& outputs,
                         size_t stream, const py::object&) {
  GraphRunnerOptions options;
  for (const auto& [exec, segments] : graphs) {
    options.graphs.push_back({reinterpret_cast<cuda::GraphExec>(exec), positive(segments, "segments of a graph")});
  }
  for (const auto& [device, bytes] : outputs)
    options.outputs.push_back({device, positive(bytes, "bytes of an output")});
  options.segment_size = positive(segment_size, "segment_size");
  options.piece_segments = positive(piece_segments, "piece_segments");
  options.ids = ids, options.lengths = lengths, options.counter = counter, options.finite = finite;
  options.compute = reinterpret_cast<cuda::Stream>(stream);
  return RunnerHolder(new GraphRunner(driver_of(driver), std::move(options)));
}

bool advance(GraphRunner& runner, SegmentStream& stream, py::ssize_t limit) {
  const Poll poll = signal_poll();
  const size_t segments = positive(limit, "limit");
  const GilReleased released;
  return runner.advance(stream, segments, poll);
}

template <class T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class T>
py::list arrays_of(const std::vector<std::vector<T>>& all) {
  py::list arrays;
  for (const auto& values : all) arrays.append(array_of(values));
  return arrays;
}

cuda::HostGraph* make_host_graph(const py::function& run) {
  // Called from a launch, which holds no GIL; the last reference goes with the graph, from Python.
  return new cuda::HostGraph{[callable = run.ptr()] {
    const py::gil_scoped_acquire gil;
    py::reinterpret_borrow<py::function>(callable)();
  }};
}

py::dict runner_stats(const GraphRunner& runner) {
  const GraphRunnerStats& now = runner.stats();
  return py::dict("pieces"_a = now.pieces, "launches"_a = now.launches, "wait_seconds"_a = now.wait_seconds);
}

void bind_graph_runner(py::module_& m) {
  m.def("load_cuda_driver", [] { cuda::driver(); }, "Raises BackendError where there is no driver that can be used.");
  py::class_<cuda::HostGraph>(m, "HostGraph", "A function in the place of a captured graph, for driver='host'.")
      .def(py::init(&make_host_graph), "run"_a, py::keep_alive<1, 2>())
      .def_property_readonly("handle", [](cuda::HostGraph& graph) { return reinterpret_cast<size_t>(&graph); });
  py::class_<GraphRunner, RunnerHolder>(m, "GraphRunner", "Streams segments through captured graphs.")
      .def(py::init(&make_runner), "driver"_a, "graphs"_a, py::kw_only(), "segment_size"_a, "piece_segments"_a, "ids"_a,
           "lengths"_a, "counter"_a, "finite"_a, "outputs"_a = py::tuple(), "stream"_a = 0, "keep"_a = py::none(),
           py::keep_alive<1, 12>())
      .def("begin", &GraphRunner::begin, "rest"_a, "first"_a, "size"_a)
      .def("advance", &advance, "stream"_a, "limit"_a)
      .def("finish", &GraphRunner::finish, py::call_guard<GilReleased>())
      .def_property_readonly("failed", &GraphRunner::failed, "Whether the device or a graph failed.")
      .def_property_readonly("segments", &GraphRunner::segments, "Segments queued.")
      .def_property_readonly("tokens", &GraphRunner::tokens, "Tokens queued.")
      .def_property_readonly("folded", &GraphRunner::folded, "Segments known to be folded.")
      .def_property_readonly("finite", &GraphRunner::finite)
      .def_property_readonly("held", [](const GraphRunner& runner) { return array_of(runner.held()); })
      .def("unfolded", [](const GraphRunner& runner) { return arrays_of(runner.unfolded()); })
      .def("take_outputs", [](GraphRunner& runner) { return arrays_of(runner.take_outputs()); })
      .def("stats", &runner_stats, "pieces, launches, wait_seconds");
}

}  // namespace
}  // namespace rmt

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Token files and pushed tokens, cut into segments ahead of the compute, and captured graphs that fold them.";
  rmt::remember_main_thread();
  rmt::register_errors(m);
  rmt::bind_sources(m);
  rmt::bind_stream(m);
  rmt::bind_graph_runner(m);
}
