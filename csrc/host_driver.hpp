// A driver table without a device: "device" memory is host memory, a graph is a function, everything happens at once.
//
// It runs GraphRunner's loop where there is no GPU, over the same static buffers.
#pragma once

#include <functional>

#include "cuda_driver.hpp"

namespace rmt::cuda {

struct HostGraph {
  std::function<void()> run;  // what it throws comes out of the launch
};

inline GraphExec exec_of(HostGraph& graph) { return reinterpret_cast<GraphExec>(&graph); }

const DriverTable& host_driver();

}  // namespace rmt::cuda
