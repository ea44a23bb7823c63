// The three ways a call can fail; bindings.cpp gives each its Python exception.
#pragma once

#include <stdexcept>

namespace rmt {

// A mistake in an argument or in the order of calls: ValueError.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The input cannot be read: rmt_engine.errors.InputError.
struct InputError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Someone called stop() while or before this call waited: StreamStopped.
struct Stopped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr const char* kStoppedEarly = "the stream was stopped before its input ended";

}  // namespace rmt
