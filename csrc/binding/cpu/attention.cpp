// Attention over whole sequences.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                         double scale, const std::optional<Tensor>& visible, double dropout,
                         int64_t seed, bool causal) {
    check_mask(visible, q.size(0), q.size(1));
    check_probability(dropout, "dropout_p");
    Attention args{};
    args.q = heads_of(q, "q");
    args.k = heads_of(k, "k");
    args.v = heads_of(v, "v");
    args.lse = floats_of(lse);
    args.visible = visible ? static_cast<const uint8_t*>(visible->const_data_ptr()) : nullptr;
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.key_heads = k.size(2);
    args.head_dim = q.size(3);
    args.scale = float(scale);
    args.dropout = float(dropout);
    args.seed = uint64_t(seed);
    args.dtype = dtype_of(q);
    args.causal = causal;
    return args;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale,
                                     std::optional<Tensor> visible, double dropout, int64_t seed,
                                     bool causal) {
    float_dtype_of(q);
    check_heads({{&q, "q"}});
    check_key_heads(q, k, v);
    Tensor out = empty(q, q.sizes());
    Tensor lse = floats(q, {q.size(0), q.size(2), q.size(1)});
    Attention args = attention_args(q, k, v, lse, scale, visible, dropout, seed, causal);
    args.out = out.mutable_data_ptr();
    const int64_t blocks = ceil_div(args.time, attention_queries);
    spread(kernels().attention, args, args.batch * args.heads * blocks,
           attention_queries * args.time * args.head_dim / 16);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      std::optional<Tensor> visible, double dropout,
                                                      int64_t seed, bool causal) {
    float_dtype_of(q);
    check_heads({{&q, "q"}, {&grad, "grad"}, {&out, "out"}});
    check_key_heads(q, k, v);
    check_contiguous(lse, "lse", {q.size(0), q.size(2), q.size(1)});
    check_floats(lse, "lse");
    Tensor grad_q = empty(q, q.sizes());
    Tensor grad_k = empty(k, k.sizes());
    Tensor grad_v = empty(v, v.sizes());
    const AttentionBackward args{
        attention_args(q, k, v, lse, scale, visible, dropout, seed, causal),
        heads_of(grad, "grad"),
        heads_of(out, "out"),
        grad_q.mutable_data_ptr(),
        grad_k.mutable_data_ptr(),
        grad_v.mutable_data_ptr()};
    spread(kernels().attention_backward, args, k.size(0) * k.size(2),
           args.forward.group() * q.size(1) * q.size(1) * q.size(3) / 16);
    return {grad_q, grad_k, grad_v};
}

}  // namespace

GPT2FAST_OP(attention, "q, k, v, scale, visible, dropout, seed, causal");
GPT2FAST_OP(attention_backward, "grad, q, k, v, out, lse, scale, visible, dropout, seed, causal");

}  // namespace gpt2fast::binding
