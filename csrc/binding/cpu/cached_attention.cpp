// Attention of new queries to a cache.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Tensor attention_with_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths,
                            double scale) {
    CachedAttention args{};
    args.q = heads_of(q, "q");
    args.k = heads_of(k_cache, "k_cache");
    args.v = heads_of(v_cache, "v_cache");
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.head_dim = q.size(3);
    args.entries = k_cache.size(1);
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        GPT2FAST_CHECK(cache->size(0) == args.batch && cache->size(1) == args.entries &&
                           cache->size(2) == args.heads && cache->size(3) == args.head_dim &&
                           cache->scalar_type() == k_cache.scalar_type(),
                       "caches must be (", args.batch, ", entries, ", args.heads, ", ",
                       args.head_dim, ") and of one dtype");
    }
    std::vector<int64_t> copy;
    args.lengths = checked(lengths, "lengths", args.batch, 0, args.entries, copy);
    args.scale = float(scale);
    args.dtype = float_dtype_of(q);
    args.cache_dtype = float_dtype_of(k_cache);
    Tensor out = empty(q, q.sizes());
    args.out = out.mutable_data_ptr();
    int64_t longest = 0;
    for (int64_t i = 0; i < args.batch; ++i) longest = std::max(longest, args.lengths[i]);
    const int64_t block = std::min(args.time, attention_queries);
    const int64_t blocks = ceil_div(args.time, attention_queries);
    spread(kernels().cached_attention, args, args.batch * blocks * args.heads,
           block * (longest + args.time) * args.head_dim);
    return out;
}

}  // namespace

GPT2FAST_OP(attention_with_cache, "q, k_cache, v_cache, lengths, scale");

}  // namespace gpt2fast::binding
