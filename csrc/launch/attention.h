// Launchers of csrc/kernels/attention*.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

// Heads are only read where they are arguments of the op. Head h of the queries reads head
// h / (heads / key_heads) of keys and values.
struct Attention {
    Heads<void> q, k, v;
    int64_t batch, time, heads, key_heads, head_dim;
    bool causal;
    double scale;
    const uint8_t* visible;  // (batch, time), contiguous; null if all keys are visible
    double dropout_p;
    const int64_t* seed;  // on the device; only read with dropout
    DType dtype;
};

struct AttentionForward {
    Attention attention;
    Heads<void> out;
    float* lse;  // (batch, heads, time)
};

// `workspace` holds attention_backward_floats(...) floats.
struct AttentionBackward {
    Attention attention;
    Heads<void> grad, out;
    const float* lse;
    Heads<void> grad_q, grad_k, grad_v;  // as many heads as q, k and v have
    float* workspace;
    bool deterministic;  // without atomics, whose order is the blocks'
};

constexpr int64_t attention_head_dim_limit = 128;

// Why no kernel can run these, or null: 16-bit tensors need a head size and strides that are
// multiples of 8 elements and addresses that are multiples of 16 bytes.
const char* attention_refuses(const Attention& args);

int64_t attention_backward_floats(const Attention& args, bool deterministic);

void attention_forward(const AttentionForward& args, void* stream);
void attention_backward(const AttentionBackward& args, void* stream);

}  // namespace gpt2fast::launch
