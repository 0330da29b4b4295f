// Launchers of csrc/kernels/cache.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

struct AppendToCache {
    Heads<const void> from[2];  // keys and values
    Heads<void> cache[2];
    Integers lengths;
    Integers counts;  // or null
    int64_t batch, time, heads, head_dim, entries;
    DType dtype, cache_dtype;
    Heads<void> scales[2];  // of int8 caches: (batch, entries, heads) float32
};

struct ReorderCache {
    Heads<void> cache[2];
    Integers rows;
    int64_t count;  // of rows that are replaced: at most reorder_rows
    int64_t batch, entries, heads, head_dim;
    int64_t element_size;
};

struct ReleaseRows {
    int64_t* lengths;
    int64_t stride, count;
    Integers rows;
    int64_t released;
};

// A cache of more rows cannot be reordered in one go.
constexpr int64_t reorder_rows = 1024;

void append_to_cache(const AppendToCache& args, void* stream);
void reorder_cache(const ReorderCache& args, void* stream);
void release_rows(const ReleaseRows& args, void* stream);

}  // namespace gpt2fast::launch
