// A fiber: a stack of its own and the switch from one to another, within one OS thread.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <string>

#include "sanitizers.h"

// Saves the registers that a call must preserve on the stack that is left, whose pointer goes to
// *save, and takes them from the stack that is entered.
extern "C" void gpt2fast_switch_stack(void** save, void* enter);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.weak gpt2fast_switch_stack
.hidden gpt2fast_switch_stack
.type gpt2fast_switch_stack,@function
gpt2fast_switch_stack:
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
.size gpt2fast_switch_stack,.-gpt2fast_switch_stack
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.weak gpt2fast_switch_stack
.hidden gpt2fast_switch_stack
.type gpt2fast_switch_stack,%function
gpt2fast_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size gpt2fast_switch_stack,.-gpt2fast_switch_stack
.popsection
)");
#else
#error "the simulator's stack switch is written for x86-64 and AArch64"
#endif

namespace gpt2fast::simulator {

class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    ~Fiber() {
        forget_thread();
        if (stack_ == nullptr) return;
        allow(stack_, stack_bytes);
        munmap(stack_ - page(), stack_bytes + page());
    }

    // The next switch to this fiber calls entry, which must not return.
    void prepare(void (*entry)()) {
        if (stack_ == nullptr) allocate();
        allow(stack_, stack_bytes);  // a kernel that was given up left its frames
        fake_stack_ = nullptr;
#if defined(GPT2FAST_TSAN)
        if (thread_ == nullptr) thread_ = __tsan_create_fiber(0);
#endif
        write_first_frame(entry);
    }

#if defined(GPT2FAST_TSAN)
    void name(const std::string& name) { __tsan_set_fiber_name(thread_, name.c_str()); }
#endif

    // Makes the OS thread's own stack one that a fiber can switch back to.
    void adopt_os_thread() {
        known_ = false;
#if defined(GPT2FAST_TSAN)
        thread_ = __tsan_get_current_fiber();
        adopted_ = true;
#endif
    }

    // The first thing on a fiber's stack; host is the one that adopt_os_thread() made.
    GPT2FAST_NO_TSAN static void entered([[maybe_unused]] Fiber& host) {
#if defined(GPT2FAST_ASAN)
        const void* left = nullptr;
        size_t left_bytes = 0;
        __sanitizer_finish_switch_fiber(nullptr, &left, &left_bytes);
        if (!host.known_) {
            host.known_ = true;
            host.stack_seen_ = left;
            host.stack_seen_bytes_ = left_bytes;
        }
#endif
    }

    // Leaves *this, for good if it has ended.
    GPT2FAST_NO_TSAN void switch_to(Fiber& other, bool ended = false) {
        ended_ = ended;
#if defined(GPT2FAST_TSAN)
        __tsan_switch_to_fiber(other.thread_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(GPT2FAST_ASAN)
        __sanitizer_start_switch_fiber(ended ? nullptr : &fake_stack_, other.stack_seen_,
                                       other.stack_seen_bytes_);
#endif
        gpt2fast_switch_stack(&stack_pointer_, other.stack_pointer_);
#if defined(GPT2FAST_ASAN)
        __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
    }

    // For a fiber that waits and will never continue: its thread ends here, as far as
    // ThreadSanitizer knows, in the Bookkeeping that every wait is inside of.
    GPT2FAST_NO_TSAN void give_up([[maybe_unused]] Fiber& host, [[maybe_unused]] Clock& end) {
#if defined(GPT2FAST_TSAN)
        if (ended_) return;
        __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
        end_bookkeeping();
        end.release();
        __tsan_switch_to_fiber(host.thread_, __tsan_switch_to_fiber_no_sync);
        forget_thread();
#endif
        ended_ = true;
    }

private:
    static constexpr size_t stack_bytes = 256 * 1024;

    static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

    void allocate() {
        // A page below that faults: a kernel that overruns its stack stops there.
        void* memory = mmap(nullptr, stack_bytes + page(), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        mprotect(memory, page(), PROT_NONE);
        stack_ = static_cast<char*>(memory) + page();
        stack_seen_ = stack_;
        stack_seen_bytes_ = stack_bytes;
    }

    void write_first_frame(void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack_ + stack_bytes);
#if defined(__x86_64__)
        // Six registers, where to return to, and the return address of a caller that isn't there.
        void** frame = top - 8;
        for (int i = 0; i < 8; ++i) frame[i] = nullptr;
        frame[6] = reinterpret_cast<void*>(entry);
#else
        void** frame = top - 20;
        for (int i = 0; i < 20; ++i) frame[i] = nullptr;
        frame[11] = reinterpret_cast<void*>(entry);  // x30
#endif
        stack_pointer_ = frame;
    }

    void forget_thread() {
#if defined(GPT2FAST_TSAN)
        if (thread_ != nullptr && !adopted_) __tsan_destroy_fiber(thread_);
        thread_ = nullptr;
#endif
    }

    void* stack_pointer_ = nullptr;
    char* stack_ = nullptr;
    bool ended_ = true;
    // For AddressSanitizer.
    const void* stack_seen_ = nullptr;
    size_t stack_seen_bytes_ = 0;
    void* fake_stack_ = nullptr;
    bool known_ = false;
#if defined(GPT2FAST_TSAN)
    void* thread_ = nullptr;
    bool adopted_ = false;
#endif
};

}  // namespace gpt2fast::simulator
