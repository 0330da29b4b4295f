// Launchers of csrc/kernels/embedding.cuh.
#pragma once

#include "launch.h"

namespace gpt2fast::launch {

// All contiguous.
struct Embedding {
    const int64_t* tokens;
    const int64_t* positions;
    const void* wte;
    const void* wpe;
    void* out;
    int64_t count, columns, wte_rows, wpe_rows;
    DType dtype;
};

// The gradient of one table, whose look-ups have been checked: what look-up order[i] of sorted[i]
// contributes.
struct EmbeddingBackward {
    const void* grad;
    const int64_t* sorted;
    const int64_t* order;
    void* grad_table;  // contiguous, zeros
    float* partials;   // embedding_partials(count) * columns floats
    int64_t count, columns, grad_stride;
    DType dtype;
};

int64_t embedding_partials(int64_t count);

void embedding_forward(const Embedding& args, void* stream);
void embedding_backward(const EmbeddingBackward& args, void* stream);

}  // namespace gpt2fast::launch
