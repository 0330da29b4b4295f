// Which kernels were launched, in blocks of how many threads and with how much shared memory: what
// csrc/tests/resources.py needs to know besides the compiler's registers.
//
//   GPT2FAST_SIM_LAUNCHES=FILE   written when the program ends: a line "symbol threads bytes" for
//                                each kernel, the largest of each. Symbols are looked up at run
//                                time: the program exports them (-rdynamic)
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
            const bool named = dladdr(kernel, &found) != 0 && found.dli_saddr == kernel;
            std::fprintf(file, "%s %zu %zu\n", named ? found.dli_sname : "?", largest.threads,
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
