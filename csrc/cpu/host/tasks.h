// Threads and their scratch memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "core/platform.h"

namespace tf {

// Memory that a thread keeps between calls, so that a small problem does not pay for the allocator.
class Scratch {
  public:
    char* get(int64_t bytes) {
        if (bytes > size_) {
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64)))));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_.get();
    }
    // Large scratch is given back: it belongs to one unusual problem.
    void trim() {
        if (size_ > (int64_t{8} << 20)) {
            memory_.reset();
            size_ = 0;
        }
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::unique_ptr<char, Free> memory_;
    int64_t size_ = 0;
};

inline thread_local Scratch thread_scratch;

// Runs fn(task, workspace) over the tasks, in order of their numbers, with up to num_threads threads. An exception
// (only memory can run out) is carried out of the parallel region.
template <class Fn>
void run_tasks(int64_t count, int num_threads, int64_t workspace, Fn&& fn) {
    const int threads = static_cast<int>(std::min<int64_t>(num_threads, count));
    if (threads <= 1) {
        char* memory = thread_scratch.get(workspace);
        for (int64_t task = 0; task < count; ++task) fn(task, memory);
        thread_scratch.trim();
        return;
    }
    bool failed = false;
#pragma omp parallel num_threads(threads)
    {
        char* memory = nullptr;
        try {
            memory = thread_scratch.get(workspace);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count; ++task) {
            if (memory != nullptr) fn(task, memory);
        }
        thread_scratch.trim();
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace tf
