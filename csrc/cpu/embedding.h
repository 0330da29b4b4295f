// Sum of two embeddings, and the gradient of a table.
//
// Forward: a row is read from each table and one is written. Backward: the table's gradient is
// written once, row by row, rows that nobody looked up as zeros: V * C elements, 154 MB for GPT-2
// in float32; beside that the looked-up rows are read once. Each row is summed in float32 in the
// order of the look-ups, by one thread, so equal runs give equal bits.
#pragma once

#include "rows.h"
#include "scratch.h"

namespace gpt2fast::GPT2FAST_ISA {

template <typename T>
void embedding_rows(const Embedding& args, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        const T* token = static_cast<const T*>(args.wte) + args.tokens[i] * args.columns;
        const T* position = static_cast<const T*>(args.wpe) + args.positions[i] * args.columns;
        T* out = static_cast<T*>(args.out) + i * args.columns;
        for_columns(args.columns, [&](int64_t j, auto step, auto) {
            store(load(token + j, step) + load(position + j, step), out + j, step);
        });
    }
}

inline void embedding(const Embedding& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        embedding_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

template <typename T>
void embedding_backward_rows(const EmbeddingBackward& args, int64_t begin, int64_t end) {
    Scratch scratch(args.columns);
    float* sums = scratch.take(args.columns);
    for (int64_t row = begin; row < end; ++row) {
        T* out = static_cast<T*>(args.out) + row * args.columns;
        if (args.starts[row] == args.starts[row + 1]) {
            int64_t empty = row + 1;
            while (empty < end && args.starts[empty] == args.starts[empty + 1]) ++empty;
            std::memset(out, 0, size_t((empty - row) * args.columns) * sizeof(T));
            row = empty - 1;
            continue;
        }
        std::memset(sums, 0, size_t(args.columns) * sizeof(float));
        for (int64_t i = args.starts[row]; i < args.starts[row + 1]; ++i) {
            const T* grad = static_cast<const T*>(args.grad) + args.order[i] * args.grad_stride;
            for_columns(args.columns, [&](int64_t j, auto step, auto) {
                store(load(sums + j, step) + load(grad + j, step), sums + j, step);
            });
        }
        for_columns(args.columns, [&](int64_t j, auto step, auto) {
            store(load(sums + j, step), out + j, step);
        });
    }
}

inline void embedding_backward(const EmbeddingBackward& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        embedding_backward_rows<std::remove_pointer_t<decltype(type)>>(args, begin, end);
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
