// The cp.async copies that one CUDA thread has under way.
//
// A copy whose arrival is deferred fills its destination with NaN and is made when its group is
// waited for: a thread that reads before the wait, or waits for too few groups, reads NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>

#include "error.h"
#include "sanitizers.h"

namespace gpt2fast::simulator {

// The simulator's own moves, in words: memset and memcpy would be seen by the sanitizers.
GPT2FAST_UNCHECKED inline void move_words(void* to, const void* from, int bytes) {
    for (int i = 0; i < bytes / 4; ++i) {
        static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
    }
}

GPT2FAST_UNCHECKED inline void fill_words(void* to, uint32_t word, int bytes) {
    for (int i = 0; i < bytes / 4; ++i) static_cast<uint32_t*>(to)[i] = word;
}

constexpr uint32_t nan_word = 0xFFFFFFFFu;  // a NaN in fp32, and two in bf16 and fp16

class AsyncCopies {
public:
    void clear() {
        copies_.clear();
        groups_.clear();
        open_ = 0;
    }

    void add(void* to, const void* from, int bytes, const Site& site) {
        copies_.push_back({to, from, bytes, site});
        ++open_;
    }

    void commit() {
        groups_.push_back(open_);
        open_ = 0;
    }

    // The oldest groups arrive until no more than `pending` are left.
    void wait(size_t pending) {
        while (groups_.size() > pending) {
            for (size_t i = 0; i < groups_.front(); ++i) arrive();
            Bookkeeping scope;
            groups_.pop_front();
        }
    }

    std::string unfinished() const {
        if (copies_.empty()) return "";
        return (open_ > 0 ? "exits with a cp.async that was never committed, "
                          : "exits before its cp.async was waited for, ") +
               to_string(copies_.back().site);
    }

private:
    struct Copy {
        void* to;
        const void* from;
        int bytes;
        Site site;
    };

    void arrive() {
        Copy copy{};
        {
            Bookkeeping scope;
            copy = copies_.front();
            copies_.pop_front();
        }
        kernel_read(copy.from, size_t(copy.bytes));
        kernel_write(copy.to, size_t(copy.bytes));
        move_words(copy.to, copy.from, copy.bytes);
    }

    std::deque<Copy> copies_;    // of the groups, then the open ones
    std::deque<size_t> groups_;  // how many copies each has
    size_t open_ = 0;
};

}  // namespace gpt2fast::simulator
