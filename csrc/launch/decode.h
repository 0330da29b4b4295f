// Launchers of csrc/kernels/decode.cuh.
#pragma once

#include "cache.h"

namespace gpt2fast::launch {

// The last dimension contiguous.
struct MatrixOf {
    const void* data;
    int64_t stride;
};

struct DecodeLayer {
    const void* ln_1_weight;
    const void* ln_1_bias;
    MatrixOf qkv_weight;
    const void* qkv_bias;
    MatrixOf out_weight;
    const void* out_bias;
    const void* ln_2_weight;
    const void* ln_2_bias;
    MatrixOf fc_weight;
    const void* fc_bias;
    MatrixOf proj_weight;
    const void* proj_bias;
    Heads<void> cache[2];   // keys and values of (batch, entries, heads, head_dim)
    Heads<void> scales[2];  // of int8 caches: (batch, entries, heads) float32
    float scale;            // of the attention scores
};

struct DecodeStep {
    MatrixOf wte, wpe;
    int64_t wte_rows, wpe_rows;
    const DecodeLayer* layers;
    int64_t layer_count;
    const void* ln_f_weight;
    const void* ln_f_bias;
    MatrixOf projection;  // (vocab, width)
    Integers tokens, positions, lengths;
    void* logits;  // (batch, vocab)
    int64_t batch, width, inner, heads, head_dim, entries, vocab;
    float eps;
    DType dtype, cache_dtype;
    float* work;        // decode_work floats
    unsigned* tickets;  // decode_tickets of them, zero before and after
};

// Wider models are refused: the logits' activations would not fit into shared memory.
constexpr int64_t decode_width = 6144;

int64_t decode_work(const DecodeStep& args);
int64_t decode_tickets(const DecodeStep& args);

// GELU is the activation of the inner layer.
void decode_step(const DecodeStep& args, void* stream);

}  // namespace gpt2fast::launch
