// Ops on a cache of keys and values.
#include "caches.h"

namespace gpt2fast::binding {
namespace {

void append_to_cache(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor lengths,
                     std::optional<Tensor> counts, std::optional<Tensor> k_scales,
                     std::optional<Tensor> v_scales) {
    const OnDeviceOf on(k_cache);
    for (const Tensor* each : {&k, &v, &v_cache}) {
        check_device(*each, "keys and values", k_cache, "the cache");
    }
    check_rows(k, "k", {-1, -1, -1, -1});
    check_rows(k_cache, "k_cache", {-1, -1, -1, -1});
    GPT2FAST_CHECK(same_sizes(k, v) && same_sizes(k_cache, v_cache) && same_sizes(k, k_cache, 2) &&
                       k.size(0) == k_cache.size(0) && k.scalar_type() == v.scalar_type() &&
                       k_cache.scalar_type() == v_cache.scalar_type(),
                   "k and v must be alike, and so must the caches; of their sizes "
                   "only the second may differ");
    launch::AppendToCache args{};
    args.from[0] = heads_of(k, "k");
    args.from[1] = heads_of(v, "v");
    args.cache[0] = mutable_heads_of(k_cache, "k_cache");
    args.cache[1] = mutable_heads_of(v_cache, "v_cache");
    args.batch = k.size(0);
    args.time = k.size(1);
    args.heads = k.size(2);
    args.head_dim = k.size(3);
    args.entries = k_cache.size(1);
    args.lengths = integers_of(lengths, "lengths", args.batch, k_cache);
    if (counts.has_value()) args.counts = integers_of(*counts, "counts", args.batch, k_cache);
    args.dtype = float_dtype_of(k);
    args.cache_dtype = dtype_of(k_cache);
    args.scales[0] = scales_of(k_scales, k_cache, "k_scales");
    args.scales[1] = scales_of(v_scales, v_cache, "v_scales");
    launch::append_to_cache(args, on.stream);
}

void reorder_cache(Tensor k_cache, Tensor v_cache, Tensor rows) {
    const OnDeviceOf on(k_cache);
    check_device(v_cache, "v_cache", k_cache, "k_cache");
    GPT2FAST_CHECK(same_sizes(k_cache, v_cache) && k_cache.scalar_type() == v_cache.scalar_type(),
                   "the caches must be alike");
    launch::ReorderCache args{};
    args.cache[0] = mutable_heads_of(k_cache, "k_cache");
    args.cache[1] = mutable_heads_of(v_cache, "v_cache");
    args.rows = integers_of(rows, "rows", -1, k_cache);
    args.count = rows.size(0);
    args.batch = k_cache.size(0);
    args.entries = k_cache.size(1);
    args.heads = k_cache.size(2);
    args.head_dim = k_cache.size(3);
    args.element_size = int64_t(k_cache.element_size());
    GPT2FAST_CHECK(args.count <= args.batch, args.count, " rows do not fit a cache of ",
                   args.batch);
    launch::reorder_cache(args, on.stream);
}

void release_rows(Tensor lengths, Tensor rows) {
    const OnDeviceOf on(lengths);
    integers_of(lengths, "lengths", -1, lengths);
    launch::release_rows({static_cast<int64_t*>(lengths.mutable_data_ptr()), lengths.stride(0),
                          lengths.size(0), integers_of(rows, "rows", -1, lengths), rows.size(0)},
                         on.stream);
}

}  // namespace

GPT2FAST_OP(append_to_cache,
            "k, v, k_cache!, v_cache!, lengths, counts, k_scales!=None, v_scales!=None");
GPT2FAST_OP(reorder_cache, "k_cache!, v_cache!, rows");
GPT2FAST_OP(release_rows, "lengths!, rows");

}  // namespace gpt2fast::binding
