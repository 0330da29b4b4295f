#include "attention.h"

#include <algorithm>
#include <cmath>

#include "../kernels/attention_backward.cuh"
#include "../kernels/attention_float.cuh"
#include "../kernels/attention_forward.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

template <int D>
struct HeadDim {
    static constexpr int value = D;
};

// Calls function(HeadDim<D>{}) with the smallest D that kernels are compiled for and that holds a
// head; the rest of it is zeros.
template <typename Function>
void with_head_dim(int64_t head_dim, Function function) {
    if (head_dim <= 32) return function(HeadDim<32>{});
    if (head_dim <= 64) return function(HeadDim<64>{});
    if (head_dim <= 96) return function(HeadDim<96>{});
    return function(HeadDim<128>{});
}

int64_t padded_head_dim(int64_t head_dim) { return ceil_div(head_dim, 32) * 32; }

void check(const Attention& args) {
    if (const char* reason = attention_refuses(args)) throw std::invalid_argument(reason);
}

dim3 grid_of(const Attention& args, int tile) {
    return dim3(unsigned(args.heads), unsigned(ceil_div(args.time, tile)), unsigned(args.batch));
}

// Of kernels whose blocks take a tile of keys.
dim3 grid_of_keys(const Attention& args, int tile) {
    dim3 grid = grid_of(args, tile);
    grid.x = unsigned(args.key_heads);
    return grid;
}

AttentionShape shape_of(const Attention& args) {
    const auto threshold = uint32_t(std::lround(args.dropout_p * 65536));
    const float kept = threshold < 65536 ? 65536.0f / float(65536 - threshold) : 0.0f;
    return {int(args.time), int(args.heads),   int(args.head_dim), int(args.heads / args.key_heads),
            args.causal,    float(args.scale), args.visible,       {args.seed, threshold, kept}};
}

// Calls function(std::bool_constant<whether weights are dropped>{}).
template <typename Function>
void with_dropout(const AttentionShape& shape, Function function) {
    if (shape.dropout.threshold == 0) return function(std::false_type{});
    return function(std::true_type{});
}

template <typename T, int D>
void forward(const AttentionForward& args, cudaStream_t stream) {
    const Attention& given = args.attention;
    const AttentionShape shape = shape_of(given);
    if constexpr (std::is_same_v<T, float>) {
        constexpr int rows_per_thread = 4;
        using Tiles = FloatTiles<D, rows_per_thread>;
        const AttentionFloatForward all{shape,
                                        given.q.as<const T>(),
                                        given.k.as<const T>(),
                                        given.v.as<const T>(),
                                        args.out.as<T>(),
                                        args.lse};
        device::launch(&attention_float_forward<D, rows_per_thread>, grid_of(given, Tiles::rows),
                       dim3(float_threads), Tiles::forward_bytes, stream, all);
    } else {
        const kernels::AttentionForward<T> all{shape,
                                               given.q.as<const T>(),
                                               given.k.as<const T>(),
                                               given.v.as<const T>(),
                                               args.out.as<T>(),
                                               args.lse};
        with_dropout(shape, [&](auto drops) {
            using Tiles = ForwardTiles<D, drops.value>;
            device::launch(&kernels::attention_forward<T, D, drops.value>,
                           grid_of(given, Tiles::queries), dim3(Tiles::threads),
                           Tiles::shared_bytes, stream, all);
        });
    }
}

template <int D>
void backward(const AttentionBackward& args, const AttentionFloatBackward& all,
              cudaStream_t stream) {
    constexpr int rows_per_thread = float_backward_rows<D>;
    using Tiles = FloatTiles<D, rows_per_thread>;
    device::launch(&attention_float_backward<D, rows_per_thread>,
                   grid_of_keys(args.attention, Tiles::rows), dim3(float_threads),
                   Tiles::backward_bytes, stream, all);
    device::launch(&attention_float_backward_query<D, rows_per_thread>,
                   grid_of(args.attention, Tiles::rows), dim3(float_threads),
                   Tiles::backward_query_bytes, stream, all);
}

int64_t statistics_floats(const Attention& args) {
    return args.batch * args.heads * padded_time(int(args.time)) * 2;
}

int64_t sums_floats(const Attention& args) {
    return args.batch * args.heads * padded_time(int(args.time)) * padded_head_dim(args.head_dim);
}

template <int D, typename T>
void backward(const AttentionBackward& args, kernels::AttentionBackward<T> all,
              cudaStream_t stream) {
    using Tiles = BackwardTiles<D>;
    using QueryTiles = BackwardQueryTiles<D>;
    const Attention& given = args.attention;
    if (!args.deterministic) {
        all.sums = args.workspace + statistics_floats(given);
        device::clear(all.sums, size_t(sums_floats(given)) * sizeof(float), stream);
    }
    with_dropout(all.shape, [&](auto drops) {
        device::launch(&kernels::attention_backward<T, D, drops.value>,
                       grid_of_keys(given, Tiles::keys), dim3(Tiles::threads), Tiles::shared_bytes,
                       stream, all);
        if (!args.deterministic) return;
        device::launch(&attention_backward_query<T, D, drops.value>,
                       grid_of(given, QueryTiles::queries), dim3(QueryTiles::threads),
                       QueryTiles::shared_bytes, stream, all);
    });
    if (!args.deterministic) {
        device::launch(&attention_grad_query<T, D>, grid_of(given, Tiles::queries),
                       dim3(Tiles::threads), 0, stream, all);
    }
}

template <typename T, int D>
void backward(const AttentionBackward& args, cudaStream_t stream) {
    const Attention& given = args.attention;
    const AttentionShape shape = shape_of(given);
    constexpr int width = std::is_same_v<T, float> ? 1 : 8;
    device::launch(&attention_statistics<T, width>, grid_of(given, statistics_rows),
                   dim3(attention_statistics_threads), 0, stream, shape, args.grad.as<const T>(),
                   args.out.as<const T>(), args.lse, args.workspace);
    using All = std::conditional_t<std::is_same_v<T, float>, AttentionFloatBackward,
                                   kernels::AttentionBackward<T>>;
    All all{};
    all.shape = shape;
    all.q = given.q.as<const T>();
    all.k = given.k.as<const T>();
    all.v = given.v.as<const T>();
    all.grad = args.grad.as<const T>();
    all.grad_q = args.grad_q.as<T>();
    all.grad_k = args.grad_k.as<T>();
    all.grad_v = args.grad_v.as<T>();
    all.statistics = args.workspace;
    backward<D>(args, all, stream);
}

bool is_aligned(const Attention& args, const Heads<void>& heads) {
    if (args.dtype == DType::float32) return true;
    return reinterpret_cast<uintptr_t>(heads.data) % 16 == 0 && heads.row_stride % 8 == 0 &&
           heads.entry_stride % 8 == 0 && heads.head_stride % 8 == 0;
}

void check_aligned(const Attention& args, const Heads<void>& heads) {
    if (!is_aligned(args, heads)) {
        throw std::invalid_argument("attention needs addresses of multiples of 16 bytes");
    }
}

}  // namespace

const char* attention_refuses(const Attention& args) {
    if (args.batch < 1 || args.time < 1 || args.heads < 1 || args.head_dim < 1) {
        return "attention needs at least one element";
    }
    if (args.key_heads < 1 || args.heads % args.key_heads != 0) {
        return "attention needs as many heads of queries for each head of keys";
    }
    if (args.head_dim > attention_head_dim_limit) return "attention takes heads of 128 at most";
    if (args.dtype != DType::float32 && args.head_dim % 8 != 0) {
        return "attention in 16 bits takes head sizes that are multiples of 8";
    }
    if (!(args.dropout_p >= 0.0 && args.dropout_p <= 1.0)) return "dropout_p is not a probability";
    if (args.batch > 65535 || args.time > 65535 * 32 ||
        args.batch * args.heads * ceil_div(args.time, statistics_rows) >
            INT32_MAX / statistics_rows) {
        return "attention takes 65535 rows, 2097120 positions and 2^31 of all heads at most";
    }
    for (const Heads<void>* heads : {&args.q, &args.k, &args.v}) {
        if (!is_aligned(args, *heads)) {
            return "attention needs addresses of multiples of 16 bytes";
        }
    }
    return nullptr;
}

int64_t attention_backward_floats(const Attention& args, bool deterministic) {
    const bool sums = args.dtype != DType::float32 && !deterministic;
    return statistics_floats(args) + (sums ? sums_floats(args) : 0);
}

void attention_forward(const AttentionForward& args, void* stream) {
    check(args.attention);
    check_aligned(args.attention, args.out);
    with_float(args.attention.dtype, [&](auto type) {
        with_head_dim(args.attention.head_dim, [&](auto head_dim) {
            forward<typename decltype(type)::type, decltype(head_dim)::value>(args,
                                                                              stream_of(stream));
        });
    });
}

void attention_backward(const AttentionBackward& args, void* stream) {
    check(args.attention);
    for (const Heads<void>* heads :
         {&args.grad, &args.out, &args.grad_q, &args.grad_k, &args.grad_v}) {
        check_aligned(args.attention, *heads);
    }
    with_float(args.attention.dtype, [&](auto type) {
        with_head_dim(args.attention.head_dim, [&](auto head_dim) {
            backward<typename decltype(type)::type, decltype(head_dim)::value>(args,
                                                                               stream_of(stream));
        });
    });
}

}  // namespace gpt2fast::launch
