// Hints for AddressSanitizer and ThreadSanitizer; empty without them.
//
// ThreadSanitizer sees each CUDA thread as a thread. Only barriers order them: a Clock is released
// by those who arrive and acquired by those who leave. The simulator's own reads and writes happen
// inside Bookkeeping, where they don't count; those that it makes for a kernel are announced with
// kernel_read and kernel_write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GPT2FAST_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define GPT2FAST_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define GPT2FAST_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define GPT2FAST_TSAN 1
#endif

#if defined(GPT2FAST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
extern "C" {
void __asan_loadN(const void* address, size_t bytes);
void __asan_storeN(void* address, size_t bytes);
}
#endif

#if defined(GPT2FAST_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range(const void* address, unsigned long bytes);
void __tsan_write_range(void* address, unsigned long bytes);
}
#define GPT2FAST_NO_TSAN __attribute__((no_sanitize("thread")))
#else
#define GPT2FAST_NO_TSAN
#endif

// For arithmetic on the simulator's own arrays, where checks cost and find nothing.
#define GPT2FAST_UNCHECKED __attribute__((no_sanitize("address", "thread", "undefined")))

namespace gpt2fast::simulator {

#if defined(GPT2FAST_TSAN)

inline void begin_bookkeeping() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

inline void end_bookkeeping() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

class Bookkeeping {
public:
    Bookkeeping() { begin_bookkeeping(); }
    ~Bookkeeping() { end_bookkeeping(); }
    Bookkeeping(const Bookkeeping&) = delete;
};

class Clock {
public:
    void release() { __tsan_release(this); }
    void acquire() { __tsan_acquire(this); }

private:
    uint64_t address_of_its_own_ = 0;
};

#else

class Bookkeeping {
public:
    Bookkeeping() {}
    ~Bookkeeping() {}
    Bookkeeping(const Bookkeeping&) = delete;
};

class Clock {
public:
    void release() {}
    void acquire() {}
};

#endif

// The running CUDA thread reads or writes here.
inline void kernel_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(GPT2FAST_ASAN)
    __asan_loadN(address, bytes);
#elif defined(GPT2FAST_TSAN)
    __tsan_read_range(address, bytes);
#endif
}

inline void kernel_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(GPT2FAST_ASAN)
    __asan_storeN(address, bytes);
#elif defined(GPT2FAST_TSAN)
    __tsan_write_range(address, bytes);
#endif
}

struct Range {
    const void* address;
    size_t bytes;
};

// Hardware that reads and writes beside the threads. It knows what the thread knew that made it,
// and nothing of what happened since.
class Agent {
public:
#if defined(GPT2FAST_TSAN)
    Agent() : thread_(__tsan_create_fiber(0)) {}
    Agent(Agent&& other) : thread_(std::exchange(other.thread_, nullptr)) {}
    Agent& operator=(Agent&& other) {
        std::swap(thread_, other.thread_);
        return *this;
    }
    ~Agent() {
        if (thread_ != nullptr) __tsan_destroy_fiber(thread_);
    }
#endif

    // Announces what it reads and writes. Who acquires `done` or `end` afterward comes after that.
    GPT2FAST_NO_TSAN void access(const Range* reads, size_t read_count, const Range* writes,
                                 size_t write_count, [[maybe_unused]] Clock& done,
                                 [[maybe_unused]] Clock& end) {
#if defined(GPT2FAST_TSAN)
        void* const mine = __tsan_get_current_fiber();
        __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
        for (size_t i = 0; i < read_count; ++i) kernel_read(reads[i].address, reads[i].bytes);
        for (size_t i = 0; i < write_count; ++i) {
            kernel_write(const_cast<void*>(writes[i].address), writes[i].bytes);
        }
#if defined(GPT2FAST_TSAN)
        done.release();
        end.release();
        __tsan_switch_to_fiber(mine, __tsan_switch_to_fiber_no_sync);
    }

private:
    void* thread_;
#else
    }
#endif
};

// No access at all until it is allowed again.
inline void forbid([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(GPT2FAST_ASAN)
    __asan_poison_memory_region(address, bytes);
#endif
}

inline void allow([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(GPT2FAST_ASAN)
    __asan_unpoison_memory_region(address, bytes);
#endif
}

}  // namespace gpt2fast::simulator
