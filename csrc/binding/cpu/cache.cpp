// Ops on a cache of keys and values.
#include <limits>

#include "../../cpu/row_copies.h"
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

void append_to_cache(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths,
                     std::optional<Tensor> counts) {
    AppendToCache args{};
    for (const auto& [each, name] :
         {std::pair(&k, "k"), std::pair(&v, "v"), std::pair(&k_cache, "k_cache"),
          std::pair(&v_cache, "v_cache")}) {
        check_rows(*each, name, {-1, -1, -1, -1});
    }
    const int64_t batch = k.size(0), entries = k_cache.size(1);
    args.time = k.size(1);
    args.heads = k.size(2);
    args.head_dim = k.size(3);
    args.dtype = float_dtype_of(k);
    args.cache_dtype = float_dtype_of(k_cache);
    std::vector<int64_t> lengths_copy, counts_copy;
    args.lengths = checked(lengths, "lengths", batch, 0, entries, lengths_copy);
    if (counts) {
        constexpr int64_t most = std::numeric_limits<int64_t>::max();
        args.counts = checked(*counts, "counts", batch, -most - 1, most, counts_copy);
    }
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t count = args.counts ? std::min(args.counts[row], args.time) : args.time;
        GPT2FAST_CHECK(args.lengths[row] + std::max<int64_t>(0, count) <= entries, "row ", row,
                       " holds ", args.lengths[row], " of at most ", entries, " entries; ", count,
                       " more do not fit");
    }
    for (const auto& [from, cache] : {std::pair(&k, &k_cache), std::pair(&v, &v_cache)}) {
        GPT2FAST_CHECK(from->size(0) == batch && from->size(1) == args.time &&
                           from->size(2) == args.heads && from->size(3) == args.head_dim &&
                           from->scalar_type() == k.scalar_type() && cache->size(0) == batch &&
                           cache->size(1) == entries && cache->size(2) == args.heads &&
                           cache->size(3) == args.head_dim &&
                           cache->scalar_type() == k_cache.scalar_type(),
                       "k and v must be alike, and so must the caches; of their sizes "
                       "only the second may differ");
        args.from = heads_of(*from, "k and v");
        args.cache = mutable_heads_of(*cache, "the caches");
        spread(kernels().append_to_cache, args, batch * args.time, args.heads * args.head_dim);
    }
}

void reorder_cache(Tensor k_cache, Tensor v_cache, Tensor rows) {
    check_rows(k_cache, "k_cache", {-1, -1, -1, -1});
    check_rows(v_cache, "v_cache", {k_cache.size(0), -1, -1, -1});
    const int64_t all = k_cache.size(0), count = rows.numel();
    GPT2FAST_CHECK(count <= all, count, " rows do not fit a cache of ", all);
    std::vector<int64_t> copy;
    const int64_t* from = checked(rows, "rows", count, 0, all - 1, copy);
    const std::vector<RowCopy> plan = row_copies(from, count, all);
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        const int64_t size = int64_t(cache->element_size());
        ReorderCache args{};
        args.cache = static_cast<uint8_t*>(cache->mutable_data_ptr());
        args.plan = plan.data();
        args.steps = int64_t(plan.size());
        args.row_stride = cache->stride(0) * size;
        args.entry_stride = cache->stride(1) * size;
        args.head_stride = cache->stride(2) * size;
        args.head_bytes = cache->size(3) * size;
        args.heads = cache->size(2);
        spread(kernels().reorder_cache, args, cache->size(1),
               args.steps * args.heads * args.head_bytes / 4);
    }
}

void release_rows(Tensor lengths, Tensor rows) {
    check_sizes(lengths, "lengths", {-1});
    check_integers(lengths, "lengths");
    std::vector<int64_t> copy;
    const int64_t* released = checked(rows, "rows", rows.numel(), 0, lengths.size(0) - 1, copy);
    auto* values = static_cast<int64_t*>(lengths.mutable_data_ptr());
    for (int64_t i = 0; i < rows.numel(); ++i) values[released[i] * lengths.stride(0)] = 0;
}

}  // namespace

GPT2FAST_OP(append_to_cache, "k, v, k_cache!, v_cache!, lengths, counts");
GPT2FAST_OP(reorder_cache, "k_cache!, v_cache!, rows");
GPT2FAST_OP(release_rows, "lengths!, rows");

}  // namespace gpt2fast::binding
