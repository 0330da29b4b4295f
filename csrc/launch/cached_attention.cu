#include "cached_attention.h"

#include <algorithm>
#include <cmath>

#include "../kernels/cached_attention.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

// Queries that share what is read of the cache, where there is more than one.
constexpr int tile = 4;

int64_t tiles(const CachedAttention& args) {
    return args.heads * (args.time == 1 ? 1 : ceil_div(args.time, tile));
}

// Enough blocks for every multiprocessor to have several, of at least 64 entries each.
int64_t splits(const CachedAttention& args) {
    const int64_t blocks = std::max<int64_t>(1, args.batch * tiles(args));
    const int64_t wanted = ceil_div(4 * int64_t(device::multiprocessors()), blocks);
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, ceil_div(args.entries, 64)));
}

template <typename C, int Width, int Lanes, int Vectors, int Queries>
void launch_tiles(const CachedAttention& args, cudaStream_t stream) {
    CachedAttentionArgs<C> given{};
    given.q = args.q.data;
    given.out = args.out;
    given.q_dtype = args.dtype;
    given.q_row_stride = args.q.row_stride;
    given.q_time_stride = args.q.entry_stride;
    given.q_head_stride = args.q.head_stride;
    given.k = args.k.as<const C>();
    given.v = args.v.as<const C>();
    given.k_scales = args.k_scales.as<const float>();
    given.v_scales = args.v_scales.as<const float>();
    given.lengths = args.lengths;
    given.partials = args.partials;
    given.tickets = args.tickets;
    given.time = int(args.time);
    given.heads = int(args.heads);
    given.head_dim = int(args.head_dim);
    given.entries = int(args.entries);
    given.splits = int(splits(args));
    given.scale = args.scale * float(M_LOG2E);
    device::launch(&kernels::cached_attention<C, Width, Lanes, Vectors, Queries>,
                   dim3(unsigned(given.splits), unsigned(tiles(args)), unsigned(args.batch)),
                   dim3(cached_attention_threads),
                   size_t(cached_attention_shared<Queries>(given.head_dim)) * sizeof(float), stream,
                   given);
}

template <typename C, int Queries>
void launch_lanes(const CachedAttention& args, cudaStream_t stream) {
    // 16 bytes, but of int8 only where one query leaves registers for as many sums.
    constexpr int width = sizeof(C) > 1 || Queries == 1 ? 16 / int(sizeof(C)) : 8;
    const auto aligned = [&](const Heads<const void>& heads) {
        return is_vector_aligned(heads.data, args.head_dim, heads.row_stride, sizeof(C)) &&
               is_vector_aligned(heads.data, args.head_dim, heads.entry_stride, sizeof(C)) &&
               is_vector_aligned(heads.data, args.head_dim, heads.head_stride, sizeof(C));
    };
    const int64_t lanes = ceil_div(args.head_dim, width);
    if (!aligned(args.k) || !aligned(args.v)) {
        return launch_tiles<C, 1, 32, cached_attention_head_dim / 32, Queries>(args, stream);
    }
    if constexpr (width >= 8) {
        if (lanes <= 4) return launch_tiles<C, width, 4, 1, Queries>(args, stream);
    }
    if (lanes <= 8) return launch_tiles<C, width, 8, 1, Queries>(args, stream);
    if constexpr (width <= 8) {
        if (lanes <= 16) return launch_tiles<C, width, 16, 1, Queries>(args, stream);
    }
    if constexpr (width == 4) return launch_tiles<C, width, 32, 1, Queries>(args, stream);
}

}  // namespace

int64_t cached_attention_partials(const CachedAttention& args) {
    const int64_t parts = splits(args);
    return parts == 1 ? 0 : args.batch * args.time * args.heads * parts * (args.head_dim + 2);
}

int64_t cached_attention_tickets(const CachedAttention& args) {
    return splits(args) == 1 ? 0 : args.batch * tiles(args);
}

void cached_attention(const CachedAttention& args, void* stream) {
    if (args.batch * args.time * args.heads * args.head_dim == 0) return;
    if (args.head_dim > cached_attention_head_dim) {
        throw std::invalid_argument("heads of more than 128 elements");
    }
    if (args.entries == 0) throw std::invalid_argument("a cache without entries");
    if (args.batch > 65535 || tiles(args) > 65535) {
        throw std::invalid_argument("more rows or queries than a grid has blocks");
    }
    const auto launch_cache = [&](auto cache) {
        using C = typename decltype(cache)::type;
        if (args.time == 1) return launch_lanes<C, 1>(args, stream_of(stream));
        launch_lanes<C, tile>(args, stream_of(stream));
    };
    if (args.cache_dtype != DType::int8) return with_float(args.cache_dtype, launch_cache);
    if (args.k_scales.data == nullptr || args.v_scales.data == nullptr) {
        throw std::invalid_argument("an int8 cache without factors");
    }
    launch_cache(TypeOf<int8_t>{});
}

}  // namespace gpt2fast::launch
