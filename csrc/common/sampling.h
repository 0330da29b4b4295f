// How the next token is chosen, and from what, on a CPU and a GPU alike. gpt2fast/ops/sampling.py
// says what each option means.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace gpt2fast {

// The options in the order in which ops take them, as their last arguments, and the values at which
// they change nothing. A new one is a line here, its limits in binding/common/sampling.h, and what
// the kernels do with it (cpu/sampling.h; kernels/sampling.cuh and launch/sampling.cu).
#define GPT2FAST_SAMPLING_OPTIONS(OPTION)   \
    OPTION(double, temperature, 1.0)        \
    OPTION(int64_t, top_k, 0)               \
    OPTION(double, top_p, 1.0)              \
    OPTION(double, min_p, 0.0)              \
    OPTION(double, typical_p, 1.0)          \
    OPTION(double, repetition_penalty, 1.0) \
    OPTION(int64_t, no_repeat_ngram_size, 0)

struct SamplingOptions {
#define GPT2FAST_FIELD(Type, option, neutral) Type option = neutral;
    GPT2FAST_SAMPLING_OPTIONS(GPT2FAST_FIELD)
#undef GPT2FAST_FIELD

    bool reads_history() const { return repetition_penalty != 1.0 || no_repeat_ngram_size > 0; }
};

// One token for each row of logits.
struct Sample : SamplingOptions {
    const void* logits;  // (rows, vocab), the last dimension contiguous
    int64_t rows, vocab, logits_stride;
    DType dtype;
    const int64_t* history;  // (rows, history_length); null if nothing depends on it
    int64_t history_length, history_stride, history_step;
    const float* uniform;  // a number in [0, 1) for each row, or null: the highest score is chosen
    int64_t uniform_stride;
    const uint32_t*
        token_mask;       // bit i % 32 of a row's word i / 32 allows token i; null: all may be
    int64_t mask_stride;  // words from a row to the next
    int64_t* out;         // (rows)
};

}  // namespace gpt2fast
