#include "cache.h"

#include <algorithm>

#include "../kernels/cache.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

// Elements that a thread takes at once: 16 bytes of the narrower dtype.
constexpr int append_vector = 8;

template <typename View>
bool is_aligned(const View& heads, int64_t head_dim, int64_t bytes) {
    return is_vector_aligned(heads.data, head_dim, heads.row_stride, bytes) &&
           is_vector_aligned(heads.data, head_dim, heads.entry_stride, bytes) &&
           is_vector_aligned(heads.data, head_dim, heads.head_stride, bytes);
}

unsigned counted(int64_t pieces) {
    if (pieces > INT32_MAX) throw std::invalid_argument("a cache of more than 2^31 pieces");
    return unsigned(pieces);
}

// All but the number of pieces.
template <typename From, typename To>
NewEntries<From, To> new_entries(const AppendToCache& args) {
    NewEntries<From, To> entries{};
    for (int i = 0; i < 2; ++i) {
        entries.from[i] = args.from[i].as<const From>();
        entries.cache[i] = args.cache[i].as<To>();
    }
    entries.lengths = args.lengths;
    entries.counts = args.counts;
    entries.time = int(args.time);
    entries.heads = int(args.heads);
    entries.head_dim = int(args.head_dim);
    entries.entries = int(args.entries);
    return entries;
}

template <typename From, typename To, int Vector>
void launch_append(const AppendToCache& args, cudaStream_t stream) {
    NewEntries<From, To> entries = new_entries<From, To>(args);
    entries.pieces = counted(args.batch * args.time * args.heads * (args.head_dim / Vector));
    device::launch(&kernels::append_to_cache<From, To, Vector>,
                   dim3(unsigned(ceil_div(entries.pieces, append_threads)), 2),
                   dim3(append_threads), 0, stream, entries);
}

template <typename From, int Vector, int Lanes>
void launch_int8_append(const AppendToCache& args, cudaStream_t stream) {
    NewInt8Entries<From> given{new_entries<From, int8_t>(args), {}};
    for (int i = 0; i < 2; ++i) given.scales[i] = args.scales[i].as<float>();
    given.entries.pieces = counted(args.batch * args.time * args.heads);
    device::launch(&append_to_int8_cache<From, Vector, Lanes>,
                   dim3(unsigned(ceil_div(given.entries.pieces, append_threads / Lanes)), 2),
                   dim3(append_threads), 0, stream, given);
}

// True if int8 entries can be written append_vector elements at a time.
bool is_written_by_vectors(const Heads<void>& cache) {
    return (reinterpret_cast<uintptr_t>(cache.data) | uint64_t(cache.row_stride) |
            uint64_t(cache.entry_stride) | uint64_t(cache.head_stride)) %
               append_vector ==
           0;
}

// Bytes of shared memory that a block of the reordering kernel may take: two fit into an SM.
constexpr int64_t reorder_shared = 48 * 1024;

template <typename T, int Vector>
void launch_reorder(const ReorderCache& args, cudaStream_t stream) {
    // In words of T; a word is one element or several.
    const int64_t size = args.element_size;
    Reordered<T> reordered{};
    for (int i = 0; i < 2; ++i) {
        const Heads<void>& cache = args.cache[i];
        constexpr int64_t word = sizeof(T);
        reordered.cache[i] = {static_cast<T*>(cache.data), cache.row_stride * size / word,
                              cache.entry_stride * size / word, cache.head_stride * size / word};
    }
    reordered.rows = args.rows;
    reordered.count = int(args.count);
    reordered.heads = int(args.heads);
    reordered.words = int(args.head_dim * size / int64_t(sizeof(T)));
    reordered.all_rows = int(args.batch);
    reordered.pieces = counted(args.entries * args.heads * (reordered.words / Vector));
    const int64_t piece = args.count * Vector * int64_t(sizeof(T));
    const int64_t threads =
        std::clamp<int64_t>(reorder_shared / piece / 32 * 32, 32, reorder_threads);
    device::launch(&kernels::reorder_cache<T, Vector>,
                   dim3(unsigned(ceil_div(reordered.pieces, threads)), 2), dim3(unsigned(threads)),
                   size_t(threads * piece), stream, reordered);
}

// True if all rows of both caches can be moved `bytes` at a time.
bool moves_by(const ReorderCache& args, int64_t bytes) {
    for (const Heads<void>& cache : args.cache) {
        const uint64_t address = reinterpret_cast<uintptr_t>(cache.data);
        const int64_t strides[] = {cache.row_stride, cache.entry_stride, cache.head_stride,
                                   args.head_dim};
        if (address % uint64_t(bytes) != 0) return false;
        for (int64_t stride : strides) {
            if (stride * args.element_size % bytes != 0) return false;
        }
    }
    return true;
}

}  // namespace

void append_to_cache(const AppendToCache& args, void* stream) {
    if (args.batch * args.time * args.heads * args.head_dim == 0) return;
    const bool to_int8 = args.cache_dtype == DType::int8;
    const bool aligned = [&] {
        if (args.head_dim % append_vector != 0) return false;
        for (int i = 0; i < 2; ++i) {
            if (!is_aligned(args.from[i], args.head_dim, size_of(args.dtype)) ||
                !(to_int8 ? is_written_by_vectors(args.cache[i])
                          : is_aligned(args.cache[i], args.head_dim, size_of(args.cache_dtype)))) {
                return false;
            }
        }
        return true;
    }();
    if (to_int8) {
        if (args.scales[0].data == nullptr || args.scales[1].data == nullptr) {
            throw std::invalid_argument("an int8 cache without factors");
        }
        return with_float(args.dtype, [&](auto from) {
            using From = typename decltype(from)::type;
            if (aligned) return launch_int8_append<From, append_vector, 8>(args, stream_of(stream));
            launch_int8_append<From, 1, 32>(args, stream_of(stream));
        });
    }
    with_float(args.dtype, [&](auto from) {
        with_float(args.cache_dtype, [&](auto to) {
            using From = typename decltype(from)::type;
            using To = typename decltype(to)::type;
            if (aligned) return launch_append<From, To, append_vector>(args, stream_of(stream));
            launch_append<From, To, 1>(args, stream_of(stream));
        });
    });
}

void reorder_cache(const ReorderCache& args, void* stream) {
    if (args.count * args.entries * args.heads * args.head_dim == 0) return;
    if (args.count > reorder_rows) throw std::invalid_argument("too many rows to reorder at once");
    if (moves_by(args, 16) && args.count * 16 * 32 <= reorder_shared) {
        return launch_reorder<uint32_t, 4>(args, stream_of(stream));
    }
    if (moves_by(args, 4) && args.count * 4 * 32 <= reorder_shared) {
        return launch_reorder<uint32_t, 1>(args, stream_of(stream));
    }
    launch_reorder<uint8_t, 1>(args, stream_of(stream));
}

void release_rows(const ReleaseRows& args, void* stream) {
    if (args.count == 0 || args.released == 0) return;
    constexpr int threads = 128;
    device::launch(&kernels::release_rows<threads>, dim3(unsigned(ceil_div(args.count, threads))),
                   dim3(threads), 0, stream_of(stream), args.lengths, args.stride, args.count,
                   args.rows, args.released);
}

}  // namespace gpt2fast::launch
