// A parallel loop over plain threads. Not OpenMP: a second libgomp beside torch's hangs in a forked child.
#pragma once

#include <cstdint>

namespace miwv::cpu {

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Calls body on pieces of [0, count) of at most `grain`, from up to num_threads threads, the caller's among them;
// returns when all are done. May be called from several threads at once, and in a child after fork.
void parallel_for(int64_t count, int64_t grain, int num_threads, Body body, const void* context);

template <class Work>
void parallel_for(int64_t count, int64_t grain, int num_threads, const Work& work) {
  parallel_for(
      count, grain, num_threads,
      [](const void* context, int64_t begin, int64_t end) {
        const Work& work = *static_cast<const Work*>(context);
        for (int64_t i = begin; i < end; ++i) work(i);
      },
      &work);
}

}  // namespace miwv::cpu
