// Which kernels were launched, in blocks of how many threads and with how much shared memory: what
// csrc/tests/resources.py needs to know besides the compiler's registers.
//
//   GPT2FAST_SIM_LAUNCHES=FILE   written when the program ends: for each kernel its address, where
//                                the program was loaded, and the most threads and bytes
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

namespace gpt2fast::simulator {

class Launches {
public:
    ~Launches() {
        if (file_ == nullptr) return;
        std::FILE* file = std::fopen(file_, "w");
        if (file == nullptr) {
            std::perror(file_);
            return;
        }
        for (const auto& [kernel, largest] : largest_) {
            Dl_info found{};
            dladdr(kernel, &found);
            std::fprintf(file, "%p %p %zu %zu\n", kernel, found.dli_fbase, largest.threads,
                         largest.shared_bytes);
        }
        std::fclose(file);
    }

    void add(const void* kernel, size_t threads, size_t shared_bytes) {
        if (file_ == nullptr) return;
        std::lock_guard<std::mutex> lock(mutex_);
        Size& largest = largest_[kernel];
        largest.threads = std::max(largest.threads, threads);
        largest.shared_bytes = std::max(largest.shared_bytes, shared_bytes);
    }

private:
    struct Size {
        size_t threads = 0, shared_bytes = 0;
    };

    const char* file_ = std::getenv("GPT2FAST_SIM_LAUNCHES");
    std::mutex mutex_;
    std::map<const void*, Size> largest_;
};

inline Launches& launches() {
    static Launches all;
    return all;
}

}  // namespace gpt2fast::simulator
