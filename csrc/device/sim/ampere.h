// The instructions of sm_80 that kernels reach through PTX: cp.async, ldmatrix and mma.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared_memory.h"
#include "warp.h"

namespace gpt2fast::simulator {

// ------------------------------------------------------------------------------------- cp.async

inline void copy_async(uint32_t to, const void* from, int bytes, bool valid, const Site& site) {
    unsigned char* target = resolve(to, size_t(bytes), size_t(bytes), "cp_async", site);
    if (reinterpret_cast<uintptr_t>(from) % size_t(bytes) != 0) {
        fail("cp_async: the global address is not aligned to " + std::to_string(bytes) + " bytes",
             site);
    }
    AsyncCopies& copies = thread().copies;
    kernel_write(target, size_t(bytes));
    if (!valid) {
        fill_words(target, 0, bytes);
        return;
    }
    kernel_read(from, size_t(bytes));
    if (block().settings.async == Arrival::immediate) {
        move_words(target, from, bytes);
    } else {
        fill_words(target, nan_word, bytes);
    }
    Bookkeeping scope;
    block().statistics.async_bytes += uint64_t(bytes);
    copies.add(target, from, bytes, site);
}

inline void commit_async_copies() {
    Bookkeeping scope;
    thread().copies.commit();
}

inline void wait_for_async_copies(int pending) { thread().copies.wait(size_t(pending)); }

// ------------------------------------------------------------------------------------- ldmatrix

struct MatrixRow {
    uint16_t halves[8];  // what this lane's address points at
    uint32_t bank_row;   // of the 128-byte rows that the banks make up
    uint32_t* registers;
};

// How often the banks must be passed over to read the eight rows of a matrix: a row takes four of
// the 32 banks, rows that share their banks wait for each other.
inline unsigned passes(const MatrixRow* const (&rows)[8]) {
    unsigned most = 1;
    for (const MatrixRow* row : rows) {
        unsigned in_the_way = 0;
        for (const MatrixRow* other : rows) {
            in_the_way += other->bank_row % 8 == row->bank_row % 8 &&
                          (other == row || other->bank_row != row->bank_row);
        }
        most = in_the_way > most ? in_the_way : most;
    }
    return most;
}

template <int Matrices, bool Transposed>
void distribute_matrices(const Slots& slots, uint32_t) {
    ++block().statistics.ldmatrix;
    block().statistics.ldmatrix_matrices += Matrices;
    for (int i = 0; i < Matrices; ++i) {
        const MatrixRow* rows[8];
        for (int r = 0; r < 8; ++r) {
            rows[r] = static_cast<const MatrixRow*>(slots[size_t(i * 8 + r)]);
        }
        block().statistics.ldmatrix_passes += passes(rows);
        for (int lane = 0; lane < warp_size; ++lane) {
            const int major = lane / 4, minor = lane % 4 * 2;
            const uint32_t low =
                Transposed ? rows[minor]->halves[major] : rows[major]->halves[minor];
            const uint32_t high =
                Transposed ? rows[minor + 1]->halves[major] : rows[major]->halves[minor + 1];
            static_cast<MatrixRow*>(slots[size_t(lane)])->registers[i] = low | high << 16;
        }
    }
}

// The rows of matrix i are at the addresses of lanes 8 i to 8 i + 7.
template <int Matrices, bool Transposed>
void ldmatrix(uint32_t (&registers)[Matrices], uint32_t address, const Site& site) {
    MatrixRow mine{};
    mine.registers = registers;
    if (thread().lane() < 8 * Matrices) {
        // Read by the lane whose address it is, as early as it may: what another lane has yet to
        // write is missed unless a __syncwarp lies between.
        const unsigned char* row = resolve(address, 16, 16, "ldmatrix", site);
        kernel_read(row, 16);
        move_words(mine.halves, row, 16);
        mine.bank_row = address / 16;
    }
    together<MatrixRow>(Transposed ? "ldmatrix.trans" : "ldmatrix", ~0u, true, mine,
                        distribute_matrices<Matrices, Transposed>, site);
}

// ------------------------------------------------------------------------------------------ mma

template <class T>
float half_to_float(uint32_t half);

template <>
inline float half_to_float<__nv_bfloat16>(uint32_t half) {
    const uint32_t bits = half << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

template <>
inline float half_to_float<__half>(uint32_t half) {
    // The exponent's bias differs by 112: a multiplication moves it, subnormal numbers included.
    uint32_t bits = (half & 0x7FFFu) << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    if ((half & 0x7C00u) == 0x7C00u) {
        bits |= 0x7F800000u;
    } else {
        __builtin_memcpy(&bits, &value, 4);
    }
    bits |= (half & 0x8000u) << 16;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

struct Fragments {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
};

using EightFloats = float __attribute__((vector_size(32)));

// Rows of A and columns of B that a lane holds: PTX ISA, "Matrix Fragments for mma.m16n8k16".
template <class T>
GPT2FAST_UNCHECKED void multiply_fragments(const Slots& slots, uint32_t) {
    ++block().statistics.mma;
    float a[16][16];
    EightFloats b[16], c[16];
    for (int lane = 0; lane < warp_size; ++lane) {
        const Fragments& mine = *static_cast<const Fragments*>(slots[size_t(lane)]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const int row = group + i % 2 * 8, k = pair + i / 2 * 8;
            a[row][k] = half_to_float<T>(mine.a[i] & 0xFFFFu);
            a[row][k + 1] = half_to_float<T>(mine.a[i] >> 16);
            c[group + i / 2 * 8][pair + i % 2] = mine.c[i];
        }
        for (int i = 0; i < 2; ++i) {
            b[pair + i * 8][group] = half_to_float<T>(mine.b[i] & 0xFFFFu);
            b[pair + i * 8 + 1][group] = half_to_float<T>(mine.b[i] >> 16);
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) c[row] += a[row][k] * b[k];
    }
    for (int lane = 0; lane < warp_size; ++lane) {
        const Fragments& mine = *static_cast<const Fragments*>(slots[size_t(lane)]);
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) mine.c[i] = c[group + i / 2 * 8][pair + i % 2];
    }
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
    Fragments mine{c, a, b};
    together<Fragments>("mma_m16n8k16", ~0u, true, mine, multiply_fragments<T>, site);
}

}  // namespace gpt2fast::simulator
