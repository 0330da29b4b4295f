// Launcher of csrc/kernels/sampling.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

struct Sample {
    const void* logits;  // (rows, vocab), the last dimension contiguous
    int64_t logits_stride;
    const int64_t* history;  // (rows, history_length)
    int64_t history_stride, history_step, history_length;
    const float* uniform;  // a number in [0, 1) for each row, or null: the highest score is chosen
    int64_t uniform_stride;
    int64_t* out;
    int64_t rows, vocab;
    DType dtype;
    // As in gpt2fast/ops/sampling.py.
    double temperature;
    int64_t top_k;
    double top_p, min_p, repetition_penalty;
    int64_t no_repeat_ngram_size;
    float* scores;  // rows * vocab floats where there are random numbers
    void* best;     // 8 * sample_blocks(vocab) bytes a row
};

int64_t sample_blocks(int64_t vocab);

void sample(const Sample& args, void* stream);

}  // namespace gpt2fast::launch
