// Attention over whole sequences.
#include "../../launch/attention.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Heads<void> heads_of(const Tensor& x) {
    return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

launch::Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                               const std::optional<Tensor>& visible, double dropout_p,
                               const std::optional<Tensor>& seed, bool causal) {
    check_key_heads(q, k, v);
    check_probability(dropout_p, "dropout_p");
    GPT2FAST_CHECK(dropout_p == 0.0 || seed.has_value(), "dropout needs a seed");
    check_mask(visible, q.size(0), q.size(1));
    if (visible.has_value()) check_device(*visible, "mask", q, "q");
    if (seed.has_value()) {
        check_sizes(*seed, "seed", {1});
        check_integers(*seed, "seed");
        check_device(*seed, "seed", q, "q");
    }
    return {heads_of(q),
            heads_of(k),
            heads_of(v),
            q.size(0),
            q.size(1),
            q.size(2),
            k.size(2),
            q.size(3),
            causal,
            scale,
            static_cast<const uint8_t*>(data_of(visible)),
            dropout_p,
            static_cast<const int64_t*>(data_of(seed)),
            dtype_of(q)};
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale,
                                     std::optional<Tensor> visible, double dropout_p,
                                     std::optional<Tensor> seed, bool causal) {
    float_dtype_of(q);
    check_heads({{&q, "q"}});
    const OnDeviceOf on(q);
    Tensor out = torch::stable::new_empty(q, q.sizes());
    Tensor lse = floats(q, {q.size(0), q.size(2), q.size(1)});
    launch::attention_forward({attention_of(q, k, v, scale, visible, dropout_p, seed, causal),
                               heads_of(out), floats_of(lse)},
                              on.stream);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      std::optional<Tensor> visible,
                                                      double dropout_p, std::optional<Tensor> seed,
                                                      bool causal, bool deterministic) {
    float_dtype_of(q);
    check_heads({{&q, "q"}, {&grad, "grad"}, {&out, "out"}});
    check_contiguous(lse, "lse", {q.size(0), q.size(2), q.size(1)});
    check_floats(lse, "lse");
    check_device(lse, "lse", q, "q");
    const OnDeviceOf on(q);
    const launch::Attention given = attention_of(q, k, v, scale, visible, dropout_p, seed, causal);
    Tensor grad_q = torch::stable::new_empty(q, q.sizes());
    Tensor grad_k = torch::stable::new_empty(k, k.sizes());
    Tensor grad_v = torch::stable::new_empty(v, v.sizes());
    Tensor workspace = floats(q, {launch::attention_backward_floats(given, deterministic)});
    launch::attention_backward(
        {given, heads_of(grad), heads_of(out), static_cast<const float*>(lse.const_data_ptr()),
         heads_of(grad_q), heads_of(grad_k), heads_of(grad_v), floats_of(workspace), deterministic},
        on.stream);
    return {grad_q, grad_k, grad_v};
}

}  // namespace

GPT2FAST_OP(attention, "q, k, v, scale, visible, dropout_p, seed, causal");
GPT2FAST_OP(attention_backward,
            "grad, q, k, v, out, lse, scale, visible, dropout_p, seed, causal, deterministic");

}  // namespace gpt2fast::binding
