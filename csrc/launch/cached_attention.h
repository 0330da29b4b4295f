// Launcher of csrc/kernels/cached_attention.cuh.
#pragma once

#include "cache.h"

namespace gpt2fast::launch {

struct CachedAttention {
    Heads<const void> q;  // (batch, time, heads, head_dim)
    void* out;            // as q, contiguous
    Heads<const void> k, v;
    Integers lengths;
    float* partials;    // cached_attention_partials floats
    unsigned* tickets;  // cached_attention_tickets of them, zero before and after
    int64_t batch, time, heads, head_dim, entries;
    float scale;
    DType dtype, cache_dtype;
    Heads<const void> k_scales, v_scales;  // of int8 caches: (batch, entries, heads) float32
};

// Heads of more elements are refused.
constexpr int64_t cached_attention_head_dim = 128;

// Functions of the shape, and of how many multiprocessors there are.
int64_t cached_attention_partials(const CachedAttention& args);
int64_t cached_attention_tickets(const CachedAttention& args);

void cached_attention(const CachedAttention& args, void* stream);

}  // namespace gpt2fast::launch
