// Shared by the cases of the kernels on caches: (rows, entries, heads, head size) numbers that lie
// apart, and vectors of integers.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "launch/cache.h"
#include "rows.h"

namespace gpt2fast::simulated {

struct HeadsShape {
    int64_t rows, entries, heads, head_dim;
};

// Views of packed memory: `parts` such tensors lie side by side, as queries, keys and values do;
// `offset` elements are in front. All numbers are NaN until they are set.
template <class T>
class CacheMemory {
public:
    CacheMemory(HeadsShape shape, int64_t parts = 1, int64_t offset = 0)
        : shape_(shape), parts_(parts), offset_(offset),
          memory_(offset + shape.rows * shape.entries * parts * width()) {}

    const HeadsShape& shape() const { return shape_; }
    T* part(int64_t i) { return memory_.data() + offset_ + i * width(); }
    int64_t entry_stride() const { return parts_ * width(); }
    int64_t row_stride() const { return shape_.entries * entry_stride(); }

    T& at(int64_t part_index, int64_t row, int64_t entry, int64_t head, int64_t d) {
        return part(
            part_index)[row * row_stride() + entry * entry_stride() + head * shape_.head_dim + d];
    }
    Heads<void> heads(int64_t i) {
        return {part(i), row_stride(), entry_stride(), shape_.head_dim};
    }
    Heads<const void> const_heads(int64_t i) {
        return {part(i), row_stride(), entry_stride(), shape_.head_dim};
    }
    // Entry `entry` of a row becomes random: as int8, of any size below 128.
    void fill(Random& random, int64_t row, int64_t entry, float scale = 1.0f) {
        for (int64_t i = 0; i < parts_ * width(); ++i) {
            T& value = part(0)[row * row_stride() + entry * entry_stride() + i];
            if constexpr (std::is_same_v<T, int8_t>) {
                value = int8_t(random.below(255) - 127);
            } else {
                value = device::from_float<T>(scale * random.normal());
            }
        }
    }
    Buffer<T>& memory() { return memory_; }

private:
    int64_t width() const { return shape_.heads * shape_.head_dim; }

    HeadsShape shape_;
    int64_t parts_, offset_;
    Buffer<T> memory_;
};

// (rows, entries, heads) factors of an int8 cache, NaN until they are set.
inline CacheMemory<float> factors(const HeadsShape& cache, int64_t parts = 1) {
    return CacheMemory<float>({cache.rows, cache.entries, cache.heads, 1}, parts);
}

inline Buffer<int64_t> integers(const std::vector<int64_t>& values) {
    Buffer<int64_t> buffer(int64_t(values.size()));
    for (size_t i = 0; i < values.size(); ++i) buffer[int64_t(i)] = values[i];
    return buffer;
}

}  // namespace gpt2fast::simulated
