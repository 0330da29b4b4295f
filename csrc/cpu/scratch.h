// Memory that a kernel needs while it works through its range.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

class Scratch {
public:
    explicit Scratch(int64_t floats)
        : data_(static_cast<float*>(std::aligned_alloc(64, size_t(floats + 15) / 16 * 64))) {
        if (data_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // The next `floats` floats, at a multiple of 64 bytes.
    float* take(int64_t floats) {
        float* taken = data_ + used_;
        used_ += size(floats);
        return taken;
    }
    static int64_t size(int64_t floats) { return (floats + 15) / 16 * 16; }

private:
    float* data_;
    int64_t used_ = 0;
};

}  // namespace gpt2fast::GPT2FAST_ISA
