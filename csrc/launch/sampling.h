// Launcher of csrc/kernels/sampling.cuh.
#pragma once

#include "../common/sampling.h"
#include "launch.h"

namespace gpt2fast::launch {

struct Sample : gpt2fast::Sample {
    float* scores;  // rows * vocab floats where there are random numbers
    void* best;     // 8 * sample_blocks(vocab) bytes a row
};

int64_t sample_blocks(int64_t vocab);

void sample(const Sample& args, void* stream);

}  // namespace gpt2fast::launch
