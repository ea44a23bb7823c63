// The few entry points of the CUDA driver that graph_runner uses, looked up at run time.
//
// No CUDA header and no CUDA library is needed to build this; a machine without a driver hears it when it asks for one.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace rmt::cuda {

using Result = int;  // CUresult
using DevicePointer = unsigned long long;
using Context = struct CUctx_st*;
using Stream = struct CUstream_st*;
using Event = struct CUevent_st*;
using GraphExec = struct CUgraphExec_st*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kOutOfMemory = 2;
inline constexpr unsigned kStreamNonBlocking = 1;  // no implicit order with the default stream
inline constexpr unsigned kEventBlockingSync = 1;  // a host that waits sleeps
inline constexpr unsigned kEventDisableTiming = 2;

// A driver call failed. The message names the call, the code, its name and the driver's words.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct CudaOutOfMemory : CudaError {
  using CudaError::CudaError;
};

// There is no driver here, or one that lacks what we use.
struct DriverMissing : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One entry point under the name that the driver library exports.
template <class... Arguments>
struct Call {
  const char* name;
  Result (*function)(Arguments...) = nullptr;
};

struct DriverTable {
  Call<Result, const char**> get_error_name{"cuGetErrorName"};
  Call<Result, const char**> get_error_string{"cuGetErrorString"};
  Call<Context*> get_context{"cuCtxGetCurrent"};
  Call<Context> set_context{"cuCtxSetCurrent"};
  Call<void**, size_t, unsigned> allocate_host{"cuMemHostAlloc"};
  Call<void*> free_host{"cuMemFreeHost"};
  Call<Stream*, unsigned> create_stream{"cuStreamCreate"};
  Call<Stream> destroy_stream{"cuStreamDestroy_v2"};
  Call<Stream> synchronize_stream{"cuStreamSynchronize"};
  Call<Stream, Event, unsigned> wait_event{"cuStreamWaitEvent"};
  Call<Event*, unsigned> create_event{"cuEventCreate"};
  Call<Event> destroy_event{"cuEventDestroy_v2"};
  Call<Event, Stream> record_event{"cuEventRecord"};
  Call<Event> synchronize_event{"cuEventSynchronize"};
  Call<DevicePointer, const void*, size_t, Stream> copy_up{"cuMemcpyHtoDAsync_v2"};
  Call<void*, DevicePointer, size_t, Stream> copy_down{"cuMemcpyDtoHAsync_v2"};
  Call<GraphExec, Stream> launch_graph{"cuGraphLaunch"};

  // Calls one of the entry points above. Throws CudaOutOfMemory, CudaError.
  template <class... Wanted, class... Given>
  void operator()(const Call<Wanted...>& call, Given... arguments) const {
    const Result result = call.function(arguments...);
    if (result != kSuccess) fail(call.name, result);
  }

  [[noreturn]] void fail(const char* name, Result result) const;

  // f(call) for every entry point.
  template <class F>
  void each(F f) {
    f(get_error_name), f(get_error_string), f(get_context), f(set_context), f(allocate_host), f(free_host);
    f(create_stream), f(destroy_stream), f(synchronize_stream), f(wait_event);
    f(create_event), f(destroy_event), f(record_event), f(synchronize_event);
    f(copy_up), f(copy_down), f(launch_graph);
  }
};

inline constexpr const char* kDriverLibrary = "libcuda.so.1";

// Opens the driver library, which stays open; nullptr looks in the program itself. Throws DriverMissing that names the
// library, or every entry point that it lacks.
DriverTable load_driver(const char* library = kDriverLibrary);

// The driver of this machine, opened once.
const DriverTable& driver();

// Makes a context current in this thread, and the one before it again at the end.
class CurrentContext {
 public:
  CurrentContext(const DriverTable& cuda, Context context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const DriverTable& cuda_;
  Context before_ = nullptr;
};

}  // namespace rmt::cuda
