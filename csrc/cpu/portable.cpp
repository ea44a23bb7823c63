// Vectors of four floats: what every CPU has.
#define RMT_TARGET portable
#define RMT_LANES 4
#define RMT_ROWS 6
#include "body.hpp"

namespace rmt::cpu {
const Kernels* portable_kernels() { return &kTable; }
}  // namespace rmt::cpu
