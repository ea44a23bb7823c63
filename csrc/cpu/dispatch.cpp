#include "dispatch.hpp"

#include <stdexcept>

namespace rmt::cpu {
namespace {

bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() {
#ifdef __x86_64__
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
  if (has_avx512()) found.push_back(avx512_kernels());
  if (has_avx2()) found.push_back(avx2_kernels());
  found.push_back(portable_kernels());
  return found;
}

const Kernels& choose_kernels(const std::string& name) {
  const auto all = available_kernels();
  if (name == "auto") return *all.front();
  std::string names;
  for (const Kernels* kernels : all) {
    if (name == kernels->name) return *kernels;
    names += std::string(", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set: expected one of auto" + names + " on this CPU, came \"" + name + "\"");
}

}  // namespace rmt::cpu
