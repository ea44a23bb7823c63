#include "../cuda_driver.hpp"
#include "check.hpp"

#if __has_include(<cuda.h>)
#include <cuda.h>

// Where the toolkit is, its declarations are compared with ours.
namespace {

template <class Handle>
constexpr bool is_pointer_sized = sizeof(Handle) == sizeof(void*);

static_assert(sizeof(CUresult) == sizeof(rmt::cuda::Result));
static_assert(sizeof(CUdeviceptr) == sizeof(rmt::cuda::DevicePointer));
static_assert(is_pointer_sized<CUcontext> && is_pointer_sized<CUstream> && is_pointer_sized<CUevent>);
static_assert(is_pointer_sized<CUgraphExec>);
static_assert(CUDA_SUCCESS == rmt::cuda::kSuccess && CUDA_ERROR_OUT_OF_MEMORY == rmt::cuda::kOutOfMemory);
static_assert(CU_STREAM_NON_BLOCKING == rmt::cuda::kStreamNonBlocking);
static_assert(CU_EVENT_BLOCKING_SYNC == rmt::cuda::kEventBlockingSync);
static_assert(CU_EVENT_DISABLE_TIMING == rmt::cuda::kEventDisableTiming);

// The same number of arguments of the same sizes, in the same order.
template <class... Theirs, class... Ours>
constexpr bool same_call(CUresult (*)(Theirs...), rmt::cuda::Result (*)(Ours...)) {
  if constexpr (sizeof...(Theirs) != sizeof...(Ours)) {
    return false;
  } else {
    return ((sizeof(Theirs) == sizeof(Ours) && std::is_pointer_v<Theirs> == std::is_pointer_v<Ours>) && ...);
  }
}

}  // namespace

TEST("cuda driver: our declarations are those of cuda.h") {
  const rmt::cuda::DriverTable t;
  static_assert(same_call(decltype (&cuGetErrorName)(nullptr), decltype(t.get_error_name.function)(nullptr)));
  static_assert(same_call(decltype (&cuGetErrorString)(nullptr), decltype(t.get_error_string.function)(nullptr)));
  static_assert(same_call(decltype (&cuCtxGetCurrent)(nullptr), decltype(t.get_context.function)(nullptr)));
  static_assert(same_call(decltype (&cuCtxSetCurrent)(nullptr), decltype(t.set_context.function)(nullptr)));
  static_assert(same_call(decltype (&cuMemHostAlloc)(nullptr), decltype(t.allocate_host.function)(nullptr)));
  static_assert(same_call(decltype (&cuMemFreeHost)(nullptr), decltype(t.free_host.function)(nullptr)));
  static_assert(same_call(decltype (&cuStreamCreate)(nullptr), decltype(t.create_stream.function)(nullptr)));
  static_assert(same_call(decltype (&cuStreamDestroy)(nullptr), decltype(t.destroy_stream.function)(nullptr)));
  static_assert(same_call(decltype (&cuStreamSynchronize)(nullptr), decltype(t.synchronize_stream.function)(nullptr)));
  static_assert(same_call(decltype (&cuStreamWaitEvent)(nullptr), decltype(t.wait_event.function)(nullptr)));
  static_assert(same_call(decltype (&cuEventCreate)(nullptr), decltype(t.create_event.function)(nullptr)));
  static_assert(same_call(decltype (&cuEventDestroy)(nullptr), decltype(t.destroy_event.function)(nullptr)));
  static_assert(same_call(decltype (&cuEventRecord)(nullptr), decltype(t.record_event.function)(nullptr)));
  static_assert(same_call(decltype (&cuEventSynchronize)(nullptr), decltype(t.synchronize_event.function)(nullptr)));
  static_assert(same_call(decltype (&cuMemcpyHtoDAsync)(nullptr), decltype(t.copy_up.function)(nullptr)));
  static_assert(same_call(decltype (&cuMemcpyDtoHAsync)(nullptr), decltype(t.copy_down.function)(nullptr)));
  static_assert(same_call(decltype (&cuGraphLaunch)(nullptr), decltype(t.launch_graph.function)(nullptr)));
}
#endif

using namespace rmt::cuda;

TEST("cuda driver: a library that is not there") {
  CHECK_THROWS(DriverMissing, "no CUDA driver: libcuda-not-here.so.1", load_driver("libcuda-not-here.so.1"));
  CHECK_THROWS(DriverMissing, "use executor='eager'", load_driver("libcuda-not-here.so.1"));
}

TEST("cuda driver: a library without the entry points names every one") {
  CHECK_THROWS(DriverMissing, "the CUDA driver in libm.so.6 lacks cuGetErrorName, cuGetErrorString, cuCtxGetCurrent",
               load_driver("libm.so.6"));
  CHECK_THROWS(DriverMissing, "cuGraphLaunch; install a newer driver", load_driver("libm.so.6"));
}

TEST("cuda driver: an error that the driver does not know") {
  DriverTable table;
  table.get_error_name.function = [](Result, const char**) { return 1; };
  table.get_error_string.function = [](Result, const char**) { return 1; };
  table.launch_graph.function = [](GraphExec, Stream) { return 12345; };
  CHECK_THROWS(CudaError, "cuGraphLaunch failed with an unknown error (12345): no description",
               table(table.launch_graph, nullptr, nullptr));
  table.launch_graph.function = [](GraphExec, Stream) { return kOutOfMemory; };
  CHECK_THROWS(CudaOutOfMemory, "cuGraphLaunch failed", table(table.launch_graph, nullptr, nullptr));
}

TEST("cuda driver: every entry point is in the table once") {
  DriverTable table;
  size_t calls = 0;
  table.each([&](auto& call) {
    CHECK(std::string(call.name).rfind("cu", 0) == 0);
    ++calls;
  });
  CHECK(calls * sizeof(table.launch_graph) == sizeof(table));
}
