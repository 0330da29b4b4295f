// Launcher of csrc/kernels/cross_entropy.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

struct CrossEntropy {
    void* logits;  // turned into their gradient where that is wanted
    const int64_t* targets;
    const float* factor;  // on the device: what that gradient is multiplied with
    float* losses;
    int64_t rows, columns, stride;
    int64_t ignore_index;
    bool differentiate;
    DType dtype;
};

void cross_entropy(const CrossEntropy& args, void* stream);

}  // namespace gpt2fast::launch
