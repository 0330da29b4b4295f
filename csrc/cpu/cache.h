// Writing and moving the entries of a key-value cache.
//
// Each stored element is read and written once: 2 T H D elements a row for T new entries. What is
// contiguous and keeps its type is copied as bytes.
#pragma once

#include "scratch.h"

namespace gpt2fast::GPT2FAST_ISA {

template <typename From, typename To>
void convert(const From* from, int64_t count, To* to) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(to, from, size_t(count) * sizeof(To));
    } else {
        int64_t i = 0;
        for (; i + Vec::width <= count; i += Vec::width) Vec::load(from + i).store(to + i);
        for (; i < count; ++i) gpt2fast::assign(to[i], to_float(from[i]));
    }
}

template <typename From, typename To>
void append_entries(const AppendToCache& args, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / args.time, t = item % args.time;
        if (args.counts != nullptr && t >= args.counts[row]) continue;
        const int64_t entry = args.lengths[row] + t;
        const From* from = args.from.as<const From>().at(row, t, 0);
        To* to = args.cache.as<To>().at(row, entry, 0);
        if (args.from.head_stride == args.head_dim && args.cache.head_stride == args.head_dim) {
            convert(from, args.heads * args.head_dim, to);
            continue;
        }
        for (int64_t head = 0; head < args.heads; ++head) {
            convert(from + head * args.from.head_stride, args.head_dim,
                    to + head * args.cache.head_stride);
        }
    }
}

inline void append_to_cache(const AppendToCache& args, int64_t begin, int64_t end) {
    const bool narrow = args.dtype == DType::bfloat16, stored = args.cache_dtype == DType::bfloat16;
    if (narrow) {
        (stored ? append_entries<bfloat16, bfloat16> : append_entries<bfloat16, float>)(args, begin,
                                                                                        end);
    } else {
        (stored ? append_entries<float, bfloat16> : append_entries<float, float>)(args, begin, end);
    }
}

// Entries [begin, end) of every row, so that no two threads meet in one entry.
inline void reorder_cache(const ReorderCache& args, int64_t begin, int64_t end) {
    Scratch scratch((args.heads * args.head_bytes + 3) / 4);
    uint8_t* spare = reinterpret_cast<uint8_t*>(scratch.take(0));
    const bool whole = args.head_stride == args.head_bytes;
    const int64_t pieces = whole ? 1 : args.heads;
    const size_t size = size_t(whole ? args.heads * args.head_bytes : args.head_bytes);
    for (int64_t entry = begin; entry < end; ++entry) {
        for (int64_t i = 0; i < args.steps; ++i) {
            const RowCopy& step = args.plan[i];
            uint8_t* at = args.cache + entry * args.entry_stride;
            for (int64_t piece = 0; piece < pieces; ++piece) {
                uint8_t* aside = spare + piece * int64_t(size);
                uint8_t* to = step.to < 0 ? aside : at + step.to * args.row_stride;
                const uint8_t* from = step.from < 0 ? aside : at + step.from * args.row_stride;
                std::memcpy(to, from, size);
                at += args.head_stride;
            }
        }
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
