// The kernels in AVX-512's vectors and tiles, sixteen floats and twelve rows, compiled to instructions that every CPU
// has: so that they are tested on machines without it.
#define RMT_TARGET wide
#define RMT_LANES 16
#define RMT_ROWS 12
#include "cpu/body.hpp"

const rmt::cpu::Kernels* wide_kernels() { return &rmt::cpu::kTable; }
