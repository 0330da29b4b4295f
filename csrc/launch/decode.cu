#include "decode.h"

#include <algorithm>

#include "../kernels/decode.cuh"
#include "cached_attention.h"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

constexpr int64_t most_rows = 8;             // of a launch
constexpr int64_t longest_slice = 1024;      // of a product's inputs
constexpr int64_t logits_shared = 96 << 10;  // bytes, as on the smallest GPUs

// The share of a product that each block computes.
struct Division {
    int64_t columns, stretches, slice, slices;
};

// Outputs of a block: 128 bytes of a row in half precision, 256 in single, or a warp's single ones.
constexpr int64_t stretch_of(bool aligned) { return aligned ? 64 : 32; }

Division divide(int64_t inputs, int64_t outputs, bool aligned, int64_t slots) {
    const int64_t columns = stretch_of(aligned), stretches = ceil_div(outputs, columns);
    const int64_t blocks = 3 * int64_t(device::multiprocessors()) / 2;
    const int64_t wanted = std::max(ceil_div(blocks, stretches), ceil_div(inputs, longest_slice));
    const int64_t slice = ceil_div(ceil_div(inputs, wanted), slots) * slots;
    return {columns, stretches, slice, ceil_div(inputs, slice)};
}

// Calls function(rows) with 1, 2, 4 or 8, not fewer than `rows`.
template <typename Function>
void with_rows(int64_t rows, Function function) {
    if (rows == 1) return function(std::integral_constant<int, 1>{});
    if (rows == 2) return function(std::integral_constant<int, 2>{});
    if (rows <= 4) return function(std::integral_constant<int, 4>{});
    function(std::integral_constant<int, 8>{});
}

bool is_int8(const DecodeStep& args) { return args.cache_dtype == DType::int8; }

// Between the queries of two rows. Keys and values lie behind them until int8 caches take them.
int64_t q_stride(const DecodeStep& args) { return is_int8(args) ? 3 * args.width : args.width; }

// The parts of a step's workspace, in floats.
struct Work {
    int64_t x, q, attended, inner, partials, attention, total;
};

CachedAttention attention_of(const DecodeStep& args) {
    CachedAttention attention{};
    attention.lengths = args.lengths;
    attention.batch = args.batch;
    attention.time = 1;
    attention.heads = args.heads;
    attention.head_dim = args.head_dim;
    attention.entries = args.entries;
    attention.dtype = DType::float32;
    attention.cache_dtype = args.cache_dtype;
    return attention;
}

// Of the four products of a layer; `shape` of each: inputs, outputs.
template <typename Function>
void for_matmuls(const DecodeStep& args, Function function) {
    function(args.width, 3 * args.width);
    function(args.width, args.width);
    function(args.width, args.inner);
    function(args.inner, args.width);
}

Work work_of(const DecodeStep& args) {
    // Enough for either alignment: pointers differ from layer to layer.
    int64_t partials = 0;
    for_matmuls(args, [&](int64_t inputs, int64_t outputs) {
        for (const bool aligned : {false, true}) {
            const Division by = divide(inputs, outputs, aligned, 8);
            partials = std::max(partials, by.stretches * by.slices * most_rows * by.columns);
        }
    });
    const auto padded = [](int64_t floats) { return ceil_div(floats, 4) * 4; };
    Work work{};
    work.q = work.x + padded(args.batch * args.width);
    work.attended = work.q + padded(args.batch * q_stride(args));
    work.inner = work.attended + padded(args.batch * args.width);
    work.partials = work.inner + padded(args.batch * args.inner);
    work.attention = work.partials + padded(partials);
    work.total = work.attention + cached_attention_partials(attention_of(args));
    return work;
}

// A product of the step: for the rows from `first` on.
struct Matmul {
    const float* x;
    int64_t inputs;
    const void* norm_weight;  // or null
    const void* norm_bias;
    MatrixOf weight;
    const void* bias;
    int64_t outputs;
    MatmulResult result;
    float* out;
    int64_t out_stride;
};

template <typename T>
DecodedRows<T> rows_of(const DecodeStep& args, const float* x, int64_t columns,
                       const void* norm_weight, const void* norm_bias, int64_t first,
                       int64_t rows) {
    return {x + first * columns,
            columns,
            int(rows),
            int(columns),
            static_cast<const T*>(norm_weight),
            static_cast<const T*>(norm_bias),
            args.eps};
}

template <typename T, int Width, int Lanes, int Rows>
void launch_matmul(const DecodeStep& args, const DecodeLayer& layer, const Matmul& matmul,
                   int64_t first, int64_t rows, cudaStream_t stream) {
    const Division by = divide(matmul.inputs, matmul.outputs, Width > 1, decode_threads / Lanes);
    DecodeMatmul<T> given{};
    given.from = rows_of<T>(args, matmul.x, matmul.inputs, matmul.norm_weight, matmul.norm_bias,
                            first, rows);
    given.weight = static_cast<const T*>(matmul.weight.data);
    given.weight_stride = matmul.weight.stride;
    given.bias = static_cast<const T*>(matmul.bias);
    given.outputs = int(matmul.outputs);
    given.slice = int(by.slice);
    given.partials = args.work + work_of(args).partials;
    given.tickets = args.tickets;
    given.result = matmul.result;
    given.out = matmul.out + first * matmul.out_stride;
    given.out_stride = matmul.out_stride;
    for (int i = 0; i < 2; ++i) {
        given.cache[i] = layer.cache[i].data;
        given.cache_row_stride[i] = layer.cache[i].row_stride;
        given.cache_entry_stride[i] = layer.cache[i].entry_stride;
        given.cache_head_stride[i] = layer.cache[i].head_stride;
    }
    if (!is_int8(args)) given.cache_dtype = args.cache_dtype;
    given.lengths = args.lengths;
    given.first_row = int(first);
    given.head_dim = int(args.head_dim);
    given.entries = int(args.entries);
    device::launch(&kernels::decode_matmul<T, Width, Lanes, Rows>,
                   dim3(unsigned(by.stretches), unsigned(by.slices)), dim3(decode_threads),
                   decode_matmul_shared<Width, Lanes, Rows>(given.slice), stream, given);
}

template <typename T>
void launch_rows(const DecodeStep& args, const DecodeLayer& layer, const Matmul& matmul,
                 cudaStream_t stream) {
    constexpr int width = 16 / int(sizeof(T));
    const bool aligned =
        is_vector_aligned(matmul.weight.data, matmul.outputs, matmul.weight.stride, sizeof(T));
    for (int64_t first = 0; first < args.batch; first += most_rows) {
        const int64_t rows = std::min(most_rows, args.batch - first);
        with_rows(rows, [&](auto count) {
            constexpr int at_once = decltype(count)::value;
            if (aligned) {
                return launch_matmul<T, width, int(stretch_of(true)) / width, at_once>(
                    args, layer, matmul, first, rows, stream);
            }
            launch_matmul<T, 1, int(stretch_of(false)), at_once>(args, layer, matmul, first, rows,
                                                                 stream);
        });
    }
}

template <typename T>
void launch_logits(const DecodeStep& args, const float* x, cudaStream_t stream) {
    const bool aligned =
        is_vector_aligned(args.projection.data, args.width, args.projection.stride, sizeof(T));
    const bool fits = most_rows * args.width * int64_t(sizeof(float)) <= logits_shared;
    const int64_t step = fits ? most_rows : most_rows / 2;
    for (int64_t first = 0; first < args.batch; first += step) {
        const int64_t rows = std::min(step, args.batch - first);
        const DecodeLogits<T> given{
            rows_of<T>(args, x, args.width, args.ln_f_weight, args.ln_f_bias, first, rows),
            static_cast<const T*>(args.projection.data), args.projection.stride, int(args.vocab),
            static_cast<T*>(args.logits) + first * args.vocab};
        with_rows(rows, [&](auto count) {
            constexpr int at_once = decltype(count)::value;
            const dim3 grid(unsigned(ceil_div(args.vocab, logits_tokens)));
            const size_t shared = decode_logits_shared<at_once>(int(args.width));
            if (aligned) {
                device::launch(&kernels::decode_logits<T, 16 / int(sizeof(T)), at_once>, grid,
                               dim3(decode_threads), shared, stream, given);
            } else {
                device::launch(&kernels::decode_logits<T, 1, at_once>, grid, dim3(decode_threads),
                               shared, stream, given);
            }
        });
    }
}

AppendToCache new_entries_of(const DecodeStep& args, const DecodeLayer& layer, const float* q) {
    AppendToCache append{};
    for (int i = 0; i < 2; ++i) {
        append.from[i] = {q + (i + 1) * args.width, q_stride(args), q_stride(args), args.head_dim};
        append.cache[i] = layer.cache[i];
        append.scales[i] = layer.scales[i];
    }
    append.lengths = args.lengths;
    append.batch = args.batch;
    append.time = 1;
    append.heads = args.heads;
    append.head_dim = args.head_dim;
    append.entries = args.entries;
    append.dtype = DType::float32;
    append.cache_dtype = args.cache_dtype;
    return append;
}

template <typename T>
void launch_step(const DecodeStep& args, void* stream) {
    const Work work = work_of(args);
    float* const x = args.work + work.x;
    float* const q = args.work + work.q;
    float* const attended = args.work + work.attended;
    float* const inner = args.work + work.inner;
    const int64_t width = args.width;
    device::launch(&decode_embedding<T>, dim3(unsigned(args.batch)), dim3(decode_threads), 0,
                   stream_of(stream), args.tokens, args.positions,
                   Table<T>{static_cast<const T*>(args.wte.data), args.wte.stride, args.wte_rows},
                   Table<T>{static_cast<const T*>(args.wpe.data), args.wpe.stride, args.wpe_rows},
                   x, int(width));
    CachedAttention attention = attention_of(args);
    attention.q = {q, q_stride(args), width, args.head_dim};
    attention.out = attended;
    attention.partials = args.work + work.attention;
    attention.tickets = args.tickets;
    for (int64_t i = 0; i < args.layer_count; ++i) {
        const DecodeLayer& layer = args.layers[i];
        const auto matmul = [&](const Matmul& of_layer) {
            launch_rows<T>(args, layer, of_layer, stream_of(stream));
        };
        matmul({x, width, layer.ln_1_weight, layer.ln_1_bias, layer.qkv_weight, layer.qkv_bias,
                3 * width, is_int8(args) ? MatmulResult::stored : MatmulResult::split, q,
                q_stride(args)});
        if (is_int8(args)) append_to_cache(new_entries_of(args, layer, q), stream);
        attention.k = layer.cache[0].as<const void>();
        attention.v = layer.cache[1].as<const void>();
        attention.k_scales = layer.scales[0].as<const void>();
        attention.v_scales = layer.scales[1].as<const void>();
        attention.scale = layer.scale;
        cached_attention(attention, stream);
        matmul({attended, width, nullptr, nullptr, layer.out_weight, layer.out_bias, width,
                MatmulResult::added, x, width});
        matmul({x, width, layer.ln_2_weight, layer.ln_2_bias, layer.fc_weight, layer.fc_bias,
                args.inner, MatmulResult::activated, inner, args.inner});
        matmul({inner, args.inner, nullptr, nullptr, layer.proj_weight, layer.proj_bias, width,
                MatmulResult::added, x, width});
    }
    launch_logits<T>(args, x, stream_of(stream));
}

}  // namespace

int64_t decode_work(const DecodeStep& args) { return work_of(args).total; }

int64_t decode_tickets(const DecodeStep& args) {
    int64_t tickets = cached_attention_tickets(attention_of(args));
    for_matmuls(args, [&](int64_t, int64_t outputs) {
        tickets = std::max(tickets, ceil_div(outputs, stretch_of(false)));
    });
    return tickets;
}

void decode_step(const DecodeStep& args, void* stream) {
    if (args.batch == 0) return;
    if (args.width > decode_width) throw std::invalid_argument("a model wider than 6144");
    with_float(args.dtype,
               [&](auto type) { launch_step<typename decltype(type)::type>(args, stream); });
}

}  // namespace gpt2fast::launch
