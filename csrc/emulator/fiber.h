// Threads of a block as fibers of one CPU thread: stacks of their own, switched by a call.
#pragma once

#include <cstddef>

#if !defined(TF_EMULATOR_UCONTEXT) && !(defined(__x86_64__) && defined(__ELF__))
#define TF_EMULATOR_UCONTEXT 1
#endif
#if defined(TF_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define TF_EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TF_EMULATOR_ASAN 1
#endif
#endif

namespace tf::emulator {

struct Fiber {
    void* stack_pointer = nullptr;  // while it does not run
    char* stack = nullptr;          // the lowest address; of the launching thread as AddressSanitizer tells it
    size_t stack_bytes = 0;
#if defined(TF_EMULATOR_UCONTEXT)
    ucontext_t context;
#endif
#if defined(TF_EMULATOR_ASAN)
    void* fake_stack = nullptr;
#endif
};

// Gives a fiber the stack number `index` of those that are kept from launch to launch, and lets it begin in `entry`,
// which never returns. What was on the stack before is forgotten: no destructor runs.
void prepare_fiber(Fiber&, int index, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that a fiber's entry calls.
void enter_fiber();
// The last switch of a fiber.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);

}  // namespace tf::emulator
