#include "cuda_driver.hpp"

#include <dlfcn.h>

namespace rmt::cuda {
namespace {

// What the driver says about a result; it may know less than we ask.
std::string words(const Call<Result, const char**>& call, Result result, const char* otherwise) {
  const char* text = nullptr;
  if (call.function(result, &text) != kSuccess || text == nullptr) return otherwise;
  return text;
}

}  // namespace

void DriverTable::fail(const char* name, Result result) const {
  const std::string message = std::string(name) + " failed with " + words(get_error_name, result, "an unknown error") +
                              " (" + std::to_string(result) + "): " + words(get_error_string, result, "no description");
  if (result == kOutOfMemory) throw CudaOutOfMemory(message);
  throw CudaError(message);
}

DriverTable load_driver(const char* library) {
  const std::string name = library == nullptr ? "this program" : library;
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    throw DriverMissing("no CUDA driver: " + std::string(dlerror()) +
                        "; install NVIDIA's driver, or use executor='eager'");
  }
  DriverTable table;
  std::string missing;
  table.each([&](auto& call) {
    void* symbol = dlsym(handle, call.name);
    call.function = reinterpret_cast<decltype(call.function)>(symbol);
    if (symbol == nullptr) missing += (missing.empty() ? "" : ", ") + std::string(call.name);
  });
  if (missing.empty()) return table;
  dlclose(handle);
  throw DriverMissing("the CUDA driver in " + name + " lacks " + missing +
                      "; install a newer driver, or use executor='eager'");
}

const DriverTable& driver() {
  static const DriverTable table = load_driver();
  return table;
}

CurrentContext::CurrentContext(const DriverTable& cuda, Context context) : cuda_(cuda) {
  cuda_(cuda_.get_context, &before_);
  if (before_ != context) cuda_(cuda_.set_context, context);
}

// Errors stay unsaid: what went wrong inside was told already, and a destructor must not throw.
CurrentContext::~CurrentContext() { cuda_.set_context.function(before_); }

}  // namespace rmt::cuda
