// One whole step of GPT-2 for one new token of each row: embedding; for each layer normalization,
// queries, keys and values; attention (cached_attention.cuh); projection; normalization, inner
// layer with GELU; projection; then normalization and logits. Five launches a layer; six with an
// int8 cache, since a factor needs all elements of a head, which several blocks compute.
//
// Every weight is read once for up to 8 rows (124M in bfloat16: 248 MB, 52 us at 4.8 TB/s; a launch
// in a CUDA graph costs about 1.3 us, 62 of them 80 us). 2 operations a weight and row: reading is
// the floor up to 8 rows. Activations stay in float32. Not yet run on a GPU.
//
// Products: a block takes a stretch of the outputs and a slice of the inputs, so that there are
// enough blocks for every multiprocessor whatever the matrix' shape. Lanes read 16 bytes of a row
// of the matrix; the first ones are on their way while the block still normalizes its slice of the
// activations. Slots of threads take every n-th input; slots, warps, and the slices of the inputs
// are added in a fixed order, the latter by the block that comes last.
// Tokens, positions and entries outside of their tables end a kernel, as an assertion would.
// Logits: a warp reads 4 rows of the embedding at a time, so that activations in shared memory are
// read once for all 4.
#pragma once

#include "cache.cuh"
#include "gelu.cuh"
#include "elements.cuh"
#include "ticket.cuh"

namespace gpt2fast::kernels {

constexpr int decode_threads = 256;
constexpr int decode_warps = decode_threads / 32;

// Rows of equal size, the last dimension contiguous.
template <typename T>
struct Table {
    const T* data;
    int64_t stride;
    int64_t rows;
};

// Block: row. out = wte[token] + wpe[position] in float32.
template <typename T>
__global__ void __launch_bounds__(decode_threads)
    decode_embedding(Integers tokens, Integers positions, Table<T> wte, Table<T> wpe,
                     float* __restrict__ out, int columns) {
    const int64_t row = blockIdx.x, token = tokens[row], position = positions[row];
    if (token < 0 || token >= wte.rows || position < 0 || position >= wpe.rows) __trap();
    for (int i = threadIdx.x; i < columns; i += decode_threads) {
        out[row * columns + i] = to_float(wte.data[token * wte.stride + i]) +
                                 to_float(wpe.data[position * wpe.stride + i]);
    }
}

// Activations of a few rows, normalized first where there is a weight for that.
template <typename T>
struct DecodedRows {
    const float* x;
    int64_t stride;
    int rows;
    int columns;
    const T* norm_weight;  // or null
    const T* norm_bias;
    float eps;
};

// Floats of shared memory for the statistics.
template <int Rows>
constexpr int decode_statistics = 2 * decode_warps + 2 * Rows;

// Mean and 1 / standard deviation of each row, (Rows, 2) floats; a barrier must follow.
template <int Rows, typename T>
__device__ __forceinline__ const float* normal_statistics(const DecodedRows<T>& args,
                                                          float* shared) {
    constexpr int share = decode_warps / Rows;  // warps of a row
    const int warp = int(threadIdx.x) / 32, row = warp / share, part = warp % share;
    const int first = part * 32 + int(threadIdx.x) % 32;
    const float* x = args.x + row * args.stride;
    float* statistics = shared + 2 * decode_warps;
    float mean = 0.0f;
    for (int pass = 0; pass < 2; ++pass) {
        float sum = 0.0f;
        if (row < args.rows) {
            for (int c = first; c < args.columns; c += share * 32) {
                const float value = x[c] - mean;
                sum += pass == 0 ? value : value * value;
            }
        }
        sum = warp_sum(sum);
        float* exchange = shared + pass * decode_warps;
        if (threadIdx.x % 32 == 0) exchange[warp] = sum;
        __syncthreads();
        sum = 0.0f;
        for (int i = 0; i < share; ++i) sum += exchange[row * share + i];
        sum /= float(args.columns);
        if (pass == 0) {
            mean = sum;
        } else if (part == 0 && threadIdx.x % 32 == 0) {
            statistics[2 * row] = mean;
            statistics[2 * row + 1] = rsqrtf(sum + args.eps);
        }
    }
    return statistics;
}

// Calls put(row, column, value) with the (normalized) activations of [begin, end); zeros for rows
// past the last. A barrier must follow.
template <int Rows, typename T, typename Put>
__device__ __forceinline__ void read_activations(const DecodedRows<T>& args, int begin, int end,
                                                 float* shared, Put put) {
    const float* statistics = nullptr;
    if (args.norm_weight != nullptr) {
        statistics = normal_statistics<Rows>(args, shared);
        __syncthreads();
    }
    for (int c = begin + int(threadIdx.x); c < end; c += decode_threads) {
        float weight = 1.0f, bias = 0.0f;
        if (statistics != nullptr) {
            weight = to_float(args.norm_weight[c]);
            bias = to_float(args.norm_bias[c]);
        }
#pragma unroll
        for (int row = 0; row < Rows; ++row) {
            float value = row < args.rows ? args.x[row * args.stride + c] : 0.0f;
            if (statistics != nullptr && row < args.rows) {
                value = (value - statistics[2 * row]) * statistics[2 * row + 1] * weight + bias;
            }
            put(row, c, value);
        }
    }
}

// Where a product plus its bias goes.
enum class MatmulResult { split, stored, activated, added };

template <typename T>
struct DecodeMatmul {
    DecodedRows<T> from;
    const T* weight;  // (inputs, outputs), the last dimension contiguous
    int64_t weight_stride;
    const T* bias;
    int outputs;
    int slice;          // of the inputs, of each of gridDim.y blocks
    float* partials;    // (gridDim.x, gridDim.y, Rows, outputs of a block)
    unsigned* tickets;  // (gridDim.x) zeros
    MatmulResult result;
    float* out;  // stored: the product; activated: its gelu; added: to what is there already
    int64_t out_stride;
    // split: queries go to out, keys and values into the cache behind each row's end
    void* cache[2];
    int64_t cache_row_stride[2], cache_entry_stride[2], cache_head_stride[2];
    DType cache_dtype;
    Integers lengths;
    int first_row;  // of the cache
    int head_dim, entries;
};

// What an output needs besides the product, loaded before that is there.
template <typename T>
struct DecodeEnd {
    T bias;
    int64_t entry;  // of the cache, where the output goes there

    __device__ __forceinline__ void load(const DecodeMatmul<T>& args, int row, int column) {
        bias = args.bias[column];
        if (args.result == MatmulResult::split) entry = args.lengths[args.first_row + row];
    }
};

template <typename T>
__device__ __forceinline__ void finish_matmul(const DecodeMatmul<T>& args, int row, int column,
                                              float value, const DecodeEnd<T>& end) {
    value += to_float(end.bias);
    if (args.result == MatmulResult::added) {
        args.out[row * args.out_stride + column] += value;
        return;
    }
    if (args.result == MatmulResult::stored) {
        args.out[row * args.out_stride + column] = value;
        return;
    }
    if (args.result == MatmulResult::activated) {
        args.out[row * args.out_stride + column] = gelu(value);
        return;
    }
    const int width = args.outputs / 3, part = column / width, place = column % width;
    if (part == 0) {
        args.out[row * args.out_stride + place] = value;
        return;
    }
    const int64_t entry = end.entry;
    if (entry < 0 || entry >= args.entries) __trap();
    const bool keys = part == 1;
    const int64_t at =
        (args.first_row + row) * (keys ? args.cache_row_stride[0] : args.cache_row_stride[1]) +
        entry * (keys ? args.cache_entry_stride[0] : args.cache_entry_stride[1]) +
        place / args.head_dim * (keys ? args.cache_head_stride[0] : args.cache_head_stride[1]) +
        place % args.head_dim;
    store_float(keys ? args.cache[0] : args.cache[1], args.cache_dtype, at, value);
}

// Bytes of shared memory.
template <int Width, int Lanes, int Rows>
constexpr size_t decode_matmul_shared(int slice) {
    const size_t sums = size_t(decode_warps) * Rows * Width * Lanes;
    return (size_t(slice) * Rows + sums + decode_statistics<Rows> + 1) * sizeof(float);
}

// Block (stretch of Width * Lanes outputs, slice of the inputs). Lanes lanes read a row of the
// matrix, Width elements each.
template <typename T, int Width, int Lanes, int Rows>
__global__ void __launch_bounds__(decode_threads, 2) decode_matmul(const DecodeMatmul<T> args) {
    constexpr int columns = Width * Lanes, slots = decode_threads / Lanes, unroll = 4;
    GPT2FAST_SHARED(memory);
    float* const activations = reinterpret_cast<float*>(memory);  // (slice, Rows)
    float* const sums = activations + args.slice * Rows;          // (warps, Rows, columns)
    float* const statistics = sums + decode_warps * Rows * columns;
    unsigned* const flag = reinterpret_cast<unsigned*>(statistics + decode_statistics<Rows>);
    const int begin = int(blockIdx.y) * args.slice;
    const int end = min(begin + args.slice, args.from.columns);
    const int first_column = int(blockIdx.x) * columns;
    const int column = first_column + int(threadIdx.x) % Lanes * Width;
    const int slot = int(threadIdx.x) / Lanes;

    Elements<T, Width> weights[unroll];
    const auto load = [&](int input) {
#pragma unroll
        for (int u = 0; u < unroll; ++u, input += slots) {
            if (input >= end || column >= args.outputs) continue;
            weights[u].load(args.weight + input * args.weight_stride + column);
        }
    };
    load(begin + slot);
    constexpr int results = (Rows * columns + decode_threads - 1) / decode_threads;
    DecodeEnd<T> ends[results];
    // Calls function(i, ends) for each of the block's outputs that this thread finishes.
    const auto for_results = [&](auto function) {
#pragma unroll
        for (int n = 0; n < results; ++n) {
            const int i = int(threadIdx.x) + n * decode_threads;
            if (i < Rows * columns && i / columns < args.from.rows &&
                first_column + i % columns < args.outputs) {
                function(i, ends[n]);
            }
        }
    };
    for_results([&](int i, DecodeEnd<T>& of_result) {
        of_result.load(args, i / columns, first_column + i % columns);
    });
    read_activations<Rows>(args.from, begin, end, statistics, [&](int row, int c, float value) {
        activations[(c - begin) * Rows + row] = value;
    });
    __syncthreads();
    float products[Rows][Width] = {};
    for (int input = begin + slot; input < end; input += unroll * slots) {
        if (input != begin + slot) load(input);
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            if (input + u * slots >= end || column >= args.outputs) continue;
            float x[Rows];
            load_floats<Rows>(activations + (input + u * slots - begin) * Rows, x);
#pragma unroll
            for (int i = 0; i < Width; ++i) {
                const float weight = weights[u][i];
#pragma unroll
                for (int row = 0; row < Rows; ++row) products[row][i] += x[row] * weight;
            }
        }
    }

    // Slots of a warp, then warps.
#pragma unroll
    for (int distance = Lanes; distance < 32; distance *= 2) {
#pragma unroll
        for (int row = 0; row < Rows; ++row) {
#pragma unroll
            for (int i = 0; i < Width; ++i) {
                products[row][i] += __shfl_xor_sync(all_lanes, products[row][i], distance);
            }
        }
    }
    if (int(threadIdx.x) % 32 < Lanes) {
#pragma unroll
        for (int row = 0; row < Rows; ++row) {
            store_floats<Width>(sums + (int(threadIdx.x) / 32 * Rows + row) * columns +
                                    int(threadIdx.x) % Lanes * Width,
                                products[row]);
        }
    }
    __syncthreads();
    const bool split = gridDim.y > 1;
    float* const partials = args.partials + int64_t(blockIdx.x) * gridDim.y * Rows * columns;
    for_results([&](int i, const DecodeEnd<T>& of_result) {
        float sum = 0.0f;
        for (int warp = 0; warp < decode_warps; ++warp) sum += sums[warp * Rows * columns + i];
        if (split) {
            partials[blockIdx.y * Rows * columns + i] = sum;
        } else {
            finish_matmul(args, i / columns, first_column + i % columns, sum, of_result);
        }
    });
    if (!split || !is_last_block(args.tickets + blockIdx.x, gridDim.y, flag)) return;
    for_results([&](int i, const DecodeEnd<T>& of_result) {
        float sum = 0.0f;
        for (unsigned part = 0; part < gridDim.y; ++part) {
            sum += partials[part * Rows * columns + i];
        }
        finish_matmul(args, i / columns, first_column + i % columns, sum, of_result);
    });
}

template <typename T>
struct DecodeLogits {
    DecodedRows<T> from;
    const T* weight;  // (vocab, columns), the last dimension contiguous
    int64_t weight_stride;
    int vocab;
    T* logits;  // (rows, vocab)
};

constexpr int logits_tokens = 64;    // of a block
constexpr int logits_at_a_time = 4;  // of a warp

template <int Rows>
constexpr size_t decode_logits_shared(int columns) {
    return sizeof(float) * (size_t(columns) * Rows + decode_statistics<Rows>);
}

// Block: stretch of the vocabulary.
template <typename T, int Width, int Rows>
__global__ void __launch_bounds__(decode_threads, 2) decode_logits(const DecodeLogits<T> args) {
    constexpr int tokens = logits_at_a_time, part = Width < 4 ? Width : 4;
    static_assert(tokens * Rows <= 32, "a lane for each result");
    GPT2FAST_SHARED(memory);
    float* const activations = reinterpret_cast<float*>(memory);
    const int columns = args.from.columns, lane = int(threadIdx.x) % 32;
    // Lanes read 16 bytes each, those of neighbors next to each other: of 8 elements the second
    // half lies apart.
    const auto place = [&](int row, int c) {
        return row * columns + c % Width / part * (columns / (Width / part)) + c / Width * part +
               c % part;
    };
    read_activations<Rows>(
        args.from, 0, columns, activations + columns * Rows,
        [&](int row, int c, float value) { activations[place(row, c)] = value; });
    __syncthreads();
    const int end = min(args.vocab, (int(blockIdx.x) + 1) * logits_tokens);
    for (int first = int(blockIdx.x) * logits_tokens + int(threadIdx.x) / 32 * tokens; first < end;
         first += decode_warps * tokens) {
        float products[tokens][Rows] = {};
        for (int c = lane * Width; c < columns; c += 32 * Width) {
            Elements<T, Width> weights[tokens];
#pragma unroll
            for (int i = 0; i < tokens; ++i) {
                const int64_t token = min(first + i, args.vocab - 1);
                weights[i].load(args.weight + token * args.weight_stride + c);
            }
#pragma unroll
            for (int row = 0; row < Rows; ++row) {
                float x[Width];
#pragma unroll
                for (int j = 0; j < Width; j += part) {
                    const Vector<float, part> some =
                        load_vector<part>(activations + place(row, c + j));
#pragma unroll
                    for (int n = 0; n < part; ++n) x[j + n] = some.v[n];
                }
#pragma unroll
                for (int i = 0; i < tokens; ++i) {
#pragma unroll
                    for (int j = 0; j < Width; ++j) {
                        products[i][row] += x[j] * weights[i][j];
                    }
                }
            }
        }
        float mine = 0.0f;
#pragma unroll
        for (int i = 0; i < tokens; ++i) {
#pragma unroll
            for (int row = 0; row < Rows; ++row) {
                const float sum = warp_sum(products[i][row]);
                if (lane == row * tokens + i) mine = sum;
            }
        }
        const int row = lane / tokens, token = first + lane % tokens;
        if (row < min(Rows, args.from.rows) && token < args.vocab) {
            args.logits[int64_t(row) * args.vocab + token] = from_float<T>(mine);
        }
    }
}

}  // namespace gpt2fast::kernels
