// Products of quantized weights where one instruction, or dot_int8, sums those of four bytes.
#pragma once

#include "../types.h"

namespace gpt2fast::GPT2FAST_ISA {

// Adds the products of a word of each of some columns, unsigned bytes, with one of each of some
// rows.
template <int R, int C>
inline void add_bytes(IntVec (&sums)[R][C], const uint8_t* panel, const uint8_t* tile) {
    Words w[C];
    for (int c = 0; c < C; ++c) w[c] = Words::load(panel + c * 4 * Vec::width);
    for (int r = 0; r < R; ++r) {
        const Words x = Words::broadcast(tile + 4 * r);
        for (int c = 0; c < C; ++c) sums[r][c] = dot_int8(sums[r][c], w[c], x);
    }
}

// Words of two nibbles a byte whose products are summed between begin and end.
constexpr int nibble_words = 4;

struct NibbleSums {
    IntVec v;

    void begin(const IntVec& sum) { v = sum; }
    void add(Words nibbles, Words x) { v = dot_int8(v, nibbles, x); }
    // The sum before, and what was added.
    IntVec end(IntVec) const { return v; }
};

}  // namespace gpt2fast::GPT2FAST_ISA
