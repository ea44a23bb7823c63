// Shares of a kernel on the threads that torch computes with: a second pool beside them would fight for the same cores.
#pragma once

namespace rmt::cpu {

using Share = void (*)(void* context, int part, int parts);

// Calls share(context, 0 … parts-1, parts), side by side where torch's OpenMP runtime is found, else one after the
// other.
void run_shares(int parts, Share share, void* context);

// The library whose threads are used; empty where none was found and everything runs on the caller's thread.
const char* pool_name();

}  // namespace rmt::cpu
