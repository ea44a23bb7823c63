// 16 registers of eight floats: a tile takes 12 of them.
#include "kernels.hpp"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RMT_TARGET avx2
#define RMT_LANES 8
#define RMT_ROWS 6
#include "body.hpp"

namespace rmt::cpu {
const Kernels* avx2_kernels() { return &kTable; }
}  // namespace rmt::cpu
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
const rmt::cpu::Kernels* rmt::cpu::avx2_kernels() { return nullptr; }
#endif
