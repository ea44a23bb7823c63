#include "host_driver.hpp"

#include <cstdlib>
#include <cstring>

namespace rmt::cuda {
namespace {

// Streams, events and the context are only ever compared with null.
int something = 0;

template <class Handle>
Result make(Handle* handle) {
  *handle = reinterpret_cast<Handle>(&something);
  return kSuccess;
}

Result describe(Result, const char** text) {
  *text = "error of the host";
  return kSuccess;
}

Result allocate(void** memory, size_t bytes, unsigned) {
  *memory = std::calloc(bytes, 1);
  return *memory == nullptr ? kOutOfMemory : kSuccess;
}

DriverTable make_table() {
  DriverTable table;
  table.get_error_name.function = describe;
  table.get_error_string.function = describe;
  table.get_context.function = make<Context>;
  table.set_context.function = [](Context) { return kSuccess; };
  table.allocate_host.function = allocate;
  table.free_host.function = [](void* memory) {
    std::free(memory);
    return kSuccess;
  };
  table.create_stream.function = [](Stream* stream, unsigned) { return make(stream); };
  table.destroy_stream.function = [](Stream) { return kSuccess; };
  table.synchronize_stream.function = [](Stream) { return kSuccess; };
  table.wait_event.function = [](Stream, Event, unsigned) { return kSuccess; };
  table.create_event.function = [](Event* event, unsigned) { return make(event); };
  table.destroy_event.function = [](Event) { return kSuccess; };
  table.record_event.function = [](Event, Stream) { return kSuccess; };
  table.synchronize_event.function = [](Event) { return kSuccess; };
  table.copy_up.function = [](DevicePointer to, const void* from, size_t bytes, Stream) {
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return kSuccess;
  };
  table.copy_down.function = [](void* to, DevicePointer from, size_t bytes, Stream) {
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return kSuccess;
  };
  table.launch_graph.function = [](GraphExec graph, Stream) {
    reinterpret_cast<HostGraph*>(graph)->run();
    return kSuccess;
  };
  return table;
}

}  // namespace

const DriverTable& host_driver() {
  static const DriverTable table = make_table();
  return table;
}

}  // namespace rmt::cuda
