// The kernels with tiles of twelve rows, as for AVX-512, in vectors that every CPU has: so that these tiles are tested
// on machines without it.
#define RMT_TARGET wide
#define RMT_LANES 4
#define RMT_ROWS 12
#include "cpu/body.hpp"

const rmt::cpu::Kernels* wide_kernels() { return &rmt::cpu::kTable; }
