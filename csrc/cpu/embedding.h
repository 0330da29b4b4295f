// Sum of two embeddings, and the gradient of a table.
//
// Forward: a row is read from each table and one is written. Backward: the table's gradient is
// written once, row by row, rows that nobody looked up as zeros: V * C elements, 154 MB for GPT-2
// in float32; beside that the looked-up rows are read once. Where the sums are added to a gradient
// that is there, only the looked-up rows are touched. Each row is summed in float32 in the order of
// the look-ups, by one thread, so equal runs give equal bits.
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

// Zeros, in memory that may be new: the string instruction behind memset is slow to start again
// after each page fault, so that every page is written to before.
inline void clear(void* memory, size_t bytes) {
    constexpr size_t page = 4096;
    auto* const begin = static_cast<volatile char*>(memory);
    for (size_t at = 0; at < bytes; at += page) begin[at] = 0;
    if (bytes > 0) begin[bytes - 1] = 0;
    std::memset(memory, 0, bytes);
}

// T, O: types of the gradient and of the table's.
template <typename T, typename O>
void embedding_backward_rows(const EmbeddingBackward& args, int64_t begin, int64_t end) {
    Scratch scratch(args.columns);
    float* sums = scratch.take(args.columns);
    for (int64_t row = begin; row < end; ++row) {
        O* out = static_cast<O*>(args.out) + row * args.columns;
        if (args.starts[row] == args.starts[row + 1]) {
            int64_t empty = row + 1;
            while (empty < end && args.starts[empty] == args.starts[empty + 1]) ++empty;
            if (!args.add) clear(out, size_t((empty - row) * args.columns) * sizeof(O));
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
            const Vec before = args.add ? load(out + j, step) : Vec(0.0f);
            store(before + load(sums + j, step), out + j, step);
        });
    }
}

inline void embedding_backward(const EmbeddingBackward& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        with_type(args.out_dtype, [&](auto* out) {
            embedding_backward_rows<std::remove_pointer_t<decltype(type)>,
                                    std::remove_pointer_t<decltype(out)>>(args, begin, end);
        });
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
