// Tiles of 16-bit values in shared memory, and the fragments that tensor cores take from them.
//
// ldmatrix reads eight 16-byte chunks at once, of eight rows, which must lie in different banks.
// So rows have 16 bytes more than their values; then every place in a tile is a constant away from
// a lane's first. Rows of 128 values do without, or tiles would be too large for GPUs whose blocks
// get 99 KiB: their chunks are permuted by the row's number, at the cost of a register for each of
// the places that a lane reads.
#pragma once

#include "attention.cuh"

namespace gpt2fast::kernels {

template <int Columns>
struct Tile {
    static constexpr bool permuted = Columns == 128;
    static constexpr int chunks = Columns / 8;
    static constexpr int row_bytes = Columns * 2 + (permuted ? 0 : 16);

    __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
        return uint32_t(row * row_bytes + (permuted ? chunk ^ row % 8 : chunk) * 16);
    }

    // `address`, of a row and of chunk 0 or 1, moved down by a multiple of 8 rows and across by an
    // even number of chunks.
    __device__ __forceinline__ static uint32_t moved(uint32_t address, int rows, int chunk) {
        if (permuted) {
            address ^= uint32_t(chunk % 8 * 16);
            chunk = chunk / 8 * 8;
        }
        return address + uint32_t(rows * row_bytes + chunk * 16);
    }
};

// Lanes that copy a row's chunks, or as many as fit.
template <int Columns>
constexpr int lanes_across = Columns % 64 == 0 ? 8 : 4;

// Where a lane's row lies for ldmatrix_x4, as an offset into a tile. Rows first: the four 8 x 8
// matrices are rows 0-7 and 8-15 of chunk 0, then of chunk 1. Chunks first: chunks 0 and 1 of rows
// 0-7, then of rows 8-15.
//
//                                          stored with the sum's index
//                                          along the row           down the rows
//   first factor of a product (16 x 16)    rows first              chunks first, transposed
//   second factor (16 x 16, as two)        chunks first            rows first, transposed
template <int Columns>
__device__ __forceinline__ uint32_t rows_first() {
    const int lane = threadIdx.x % 32;
    return Tile<Columns>::offset(lane % 16, lane / 16);
}

template <int Columns>
__device__ __forceinline__ uint32_t chunks_first() {
    const int lane = threadIdx.x % 32;
    return Tile<Columns>::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// Starts to copy rows from `first` on. Rows past the end and columns past the head's size are zero.
template <int Rows, int Columns, int Threads, typename T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const Heads<T>& heads, int first,
                                          const BlockPlace& block, const AttentionShape& shape) {
    using Layout = Tile<Columns>;
    constexpr int across = lanes_across<Columns>, down = Threads / across;
    static_assert(Rows % down == 0, "a pass of all threads copies whole rows of the tile");
    static_assert(down % 8 == 0, "a thread's rows are permuted alike");
    const int row = threadIdx.x / across, chunk = threadIdx.x % across;
    const T* from = rows_of(heads, block, first) + row * heads.entry_stride + chunk * 8;
    const uint32_t to = tile + Layout::offset(row, chunk);
#pragma unroll
    for (int r = 0; r < Rows; r += down) {
#pragma unroll
        for (int c = 0; c < Layout::chunks; c += across) {
            const bool valid = row + r < shape.time - first && (chunk + c) * 8 < shape.head_dim;
            cp_async<16>(to + uint32_t(r * Layout::row_bytes + c * 16),
                         from + r * heads.entry_stride + c * 8, valid);
        }
    }
}

// sums[m] += first[m] * second, for a 16 x 16 second factor, of which sums[m][n] and [n + 1] are
// the two halves of the columns.
template <typename T, int M, int N>
__device__ __forceinline__ void multiply(float (&sums)[M][N][4], int n,
                                         const uint32_t (&first)[M][4],
                                         const uint32_t (&second)[4]) {
    const uint32_t left[2] = {second[0], second[1]}, right[2] = {second[2], second[3]};
#pragma unroll
    for (int m = 0; m < M; ++m) {
        mma_m16n8k16<T>(sums[m][n], first[m], left);
        mma_m16n8k16<T>(sums[m][n + 1], first[m], right);
    }
}

// Two neighboring accumulators, which hold 16 x 16 values, as the first factor of a product.
template <typename T>
__device__ __forceinline__ void as_factor(uint32_t (&factor)[4], const float (&left)[4],
                                          const float (&right)[4]) {
    factor[0] = pack2<T>(left[0], left[1]);
    factor[1] = pack2<T>(left[2], left[3]);
    factor[2] = pack2<T>(right[0], right[1]);
    factor[3] = pack2<T>(right[2], right[3]);
}

// Writes the 16 * M rows that a warp has accumulated, 16 bytes a lane, by way of as many rows of a
// tile that no other warp reads or writes. They are rows `first` and on; row r of the sums is
// multiplied by factor(m, half), r being 16 * m + 8 * half + lane / 4.
template <typename T, int M, int Columns, typename Factor>
__device__ __forceinline__ void store_rows(unsigned char* tile,
                                           const float (&sums)[M][Columns / 8][4], Factor factor,
                                           const Heads<T>& heads, int first,
                                           const BlockPlace& block, const AttentionShape& shape) {
    using Layout = Tile<Columns>;
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float times = factor(m, half);
            const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < Columns / 8; ++n) {
                const float* pair = &sums[m][n][2 * half];
                *reinterpret_cast<uint32_t*>(tile + Layout::offset(row, n) + lane % 4 * 4) =
                    pack2<T>(pair[0] * times, pair[1] * times);
            }
        }
    }
    __syncwarp();
    constexpr int across = lanes_across<Columns>, down = 32 / across;
    const int row = lane / across, chunk = lane % across;
    T* to = rows_of(heads, block, first) + row * heads.entry_stride + chunk * 8;
#pragma unroll
    for (int r = 0; r < 16 * M; r += down) {
#pragma unroll
        for (int c = 0; c < Layout::chunks; c += across) {
            if (row + r < shape.time - first && (chunk + c) * 8 < shape.head_dim) {
                const uint4 values =
                    *reinterpret_cast<const uint4*>(tile + Layout::offset(row + r, chunk + c));
                *reinterpret_cast<uint4*>(to + r * heads.entry_stride + c * 8) = values;
            }
        }
    }
}

}  // namespace gpt2fast::kernels
