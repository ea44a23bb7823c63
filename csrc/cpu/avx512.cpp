// 32 registers of sixteen floats: a tile takes 24 of them.
#include "kernels.hpp"

#ifdef __x86_64__
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define RMT_TARGET avx512
#define RMT_LANES 16
#define RMT_ROWS 12
#include "body.hpp"

namespace rmt::cpu {
const Kernels* avx512_kernels() { return &kTable; }
}  // namespace rmt::cpu
#ifdef __clang__
#pragma clang attribute pop
#endif
#else
const rmt::cpu::Kernels* rmt::cpu::avx512_kernels() { return nullptr; }
#endif
