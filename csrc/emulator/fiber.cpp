#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(TF_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(TF_EMULATOR_UCONTEXT)
// The one piece of assembly outside of cuda/ptx.cuh. Callee-saved registers go to the stack that is left; the control
// words of floating-point arithmetic stay, since no kernel changes them. A return and not a jump: fibers mostly stop in
// the same place, which the processor predicts, and calls and returns stay paired (a shuffle by a jump took 18 ns a
// lane, by a return 10).
extern "C" void tf_emulator_switch(void** from, void* to);
asm(R"(
    .text
    .p2align 4
    .globl tf_emulator_switch
    .hidden tf_emulator_switch
    .type tf_emulator_switch, @function
tf_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size tf_emulator_switch, .-tf_emulator_switch
)");
#endif

namespace tf::emulator {

namespace {

#if defined(TF_EMULATOR_ASAN)
constexpr size_t kStackBytes = 512 * 1024;  // frames are several times larger with red zones
Fiber* left_fiber = nullptr;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
// Stacks that begin at the same address modulo the cache's size evict each other: a shuffle took 18 ns a lane, now 10.
constexpr size_t kColours = 64, kColourBytes = 320;

std::vector<char*> stacks;

char* stack_of(int index) {
    while (stacks.size() <= static_cast<size_t>(index)) {
        void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        // A page that cannot be touched below each: an overflow is a crash, not another thread's data.
        mprotect(memory, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
        stacks.push_back(static_cast<char*>(memory));
    }
    return stacks[static_cast<size_t>(index)];
}

#if defined(TF_EMULATOR_UCONTEXT)
void jump(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#else
void jump(Fiber& from, Fiber& to) { tf_emulator_switch(&from.stack_pointer, to.stack_pointer); }
#endif

}  // namespace

void prepare_fiber(Fiber& fiber, int index, void (*entry)()) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    fiber.stack = stack_of(index) + page;
    fiber.stack_bytes = kStackBytes - page;
#if defined(TF_EMULATOR_ASAN)
    __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);  // frames that never returned left red zones
    fiber.fake_stack = nullptr;
#endif
    const size_t used = static_cast<size_t>(index) % kColours * kColourBytes;
#if defined(TF_EMULATOR_UCONTEXT)
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.stack_bytes - used;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#else
    // As after a call of `entry` from nowhere: six registers, the address to go on at, and a return address of 0 that
    // ends every walk of the stack. A function begins 8 bytes below a multiple of 16.
    auto* top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes - used - 64);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    fiber.stack_pointer = top - 8;
#endif
}

#if defined(TF_EMULATOR_ASAN)

void enter_fiber() {
    // Tells where the stack lies that was left; of the launching thread it is not known otherwise.
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    left_fiber->stack = static_cast<char*>(const_cast<void*>(bottom));
    left_fiber->stack_bytes = bytes;
}

void switch_fiber(Fiber& from, Fiber& to) {
    left_fiber = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
    jump(from, to);
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

void leave_fiber(Fiber& from, Fiber& to) {
    left_fiber = &from;
    __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
    jump(from, to);
    std::abort();
}

#else

void enter_fiber() {}

void switch_fiber(Fiber& from, Fiber& to) { jump(from, to); }

void leave_fiber(Fiber& from, Fiber& to) {
    jump(from, to);
    std::abort();
}

#endif

}  // namespace tf::emulator
