#include "parallel.hpp"

#include <dlfcn.h>

namespace rmt::cpu {
namespace {

// The entry points that GCC's compiled `#pragma omp parallel` calls; libgomp has them, and LLVM's and Intel's runtimes.
struct OpenMP {
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
  Parallel parallel = nullptr;
  int (*thread)() = nullptr;
  int (*threads)() = nullptr;
  const char* name = "";
};

// What libtorch_cpu itself is linked against: another library may have brought an OpenMP runtime of its own.
OpenMP find_openmp() {
  OpenMP found;
  void* torch = ::dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (!torch) return found;
  auto* parallel = reinterpret_cast<OpenMP::Parallel>(::dlsym(torch, "GOMP_parallel"));
  auto* thread = reinterpret_cast<int (*)()>(::dlsym(torch, "omp_get_thread_num"));
  auto* threads = reinterpret_cast<int (*)()>(::dlsym(torch, "omp_get_num_threads"));
  Dl_info info;
  if (!parallel || !thread || !threads || !::dladdr(reinterpret_cast<void*>(parallel), &info)) return found;
  return {parallel, thread, threads, info.dli_fname};
}

const OpenMP& openmp() {
  static const OpenMP found = find_openmp();
  return found;
}

struct Work {
  int parts;
  Share share;
  void* context;
};

// The team may be smaller than it was asked to be: every thread takes every so many-th share.
void run_thread(void* data) {
  const Work& work = *static_cast<Work*>(data);
  const int threads = openmp().threads();
  for (int part = openmp().thread(); part < work.parts; part += threads) work.share(work.context, part, work.parts);
}

}  // namespace

void run_shares(int parts, Share share, void* context) {
  if (parts == 1 || !openmp().parallel) {
    for (int part = 0; part < parts; ++part) share(context, part, parts);
    return;
  }
  Work work{parts, share, context};
  openmp().parallel(&run_thread, &work, static_cast<unsigned>(parts), 0);
}

const char* pool_name() { return openmp().name; }

}  // namespace rmt::cpu
