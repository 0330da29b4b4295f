// Attention of new queries to a cache.
#include "../../launch/cached_attention.h"

#include "caches.h"

namespace gpt2fast::binding {
namespace {

Tensor attention_with_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, double scale,
                            std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
    const OnDeviceOf on(q);
    check_rows(q, "q", {-1, -1, -1, -1});
    check_device(k_cache, "k_cache", q, "q");
    check_device(v_cache, "v_cache", q, "q");
    GPT2FAST_CHECK(same_sizes(k_cache, v_cache) && same_sizes(q, k_cache, 2) &&
                       q.size(0) == k_cache.size(0) &&
                       k_cache.scalar_type() == v_cache.scalar_type(),
                   "caches must be (", q.size(0), ", entries, ", q.size(2), ", ", q.size(3),
                   ") and of one dtype");
    launch::CachedAttention args{};
    args.q = heads_of(q, "q");
    args.k = heads_of(k_cache, "k_cache");
    args.v = heads_of(v_cache, "v_cache");
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.head_dim = q.size(3);
    args.entries = k_cache.size(1);
    args.lengths = integers_of(lengths, "lengths", args.batch, q);
    args.scale = float(scale);
    args.dtype = float_dtype_of(q);
    args.cache_dtype = dtype_of(k_cache);
    args.k_scales = const_scales_of(k_scales, k_cache, "k_scales");
    args.v_scales = const_scales_of(v_scales, v_cache, "v_scales");
    Tensor out = torch::stable::new_empty(q, q.sizes());
    args.out = out.mutable_data_ptr();
    Tensor partials = floats(q, {launch::cached_attention_partials(args)});
    Tensor tickets = zeros(q, launch::cached_attention_tickets(args));
    args.partials = floats_of(partials);
    args.tickets = tickets_of(tickets);
    launch::cached_attention(args, on.stream);
    return out;
}

}  // namespace

GPT2FAST_OP(attention_with_cache,
            "q, k_cache, v_cache, lengths, scale, k_scales=None, v_scales=None");

}  // namespace gpt2fast::binding
