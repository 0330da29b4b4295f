// Causal attention over whole sequences.
#include "../../launch/attention.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

launch::AttentionHeads heads_of(const Tensor& x) {
    return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// q, k and v are (batch, time, heads, head_dim), their last dimension contiguous.
launch::Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                               const std::optional<Tensor>& visible, double dropout_p,
                               const std::optional<Tensor>& seed) {
    STD_TORCH_CHECK(dropout_p == 0.0 || seed.has_value(), "gpt2fast: dropout needs a seed");
    return {heads_of(q),
            heads_of(k),
            heads_of(v),
            q.size(0),
            q.size(1),
            q.size(2),
            q.size(3),
            scale,
            static_cast<const uint8_t*>(data_of(visible)),
            dropout_p,
            static_cast<const int64_t*>(data_of(seed)),
            dtype_of(q)};
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale,
                                     std::optional<Tensor> visible, double dropout_p,
                                     std::optional<Tensor> seed) {
    const OnDeviceOf on(q);
    Tensor out = torch::stable::new_empty(q, q.sizes());
    Tensor lse = floats(q, {q.size(0), q.size(2), q.size(1)});
    launch::attention_forward({attention_of(q, k, v, scale, visible, dropout_p, seed),
                               heads_of(out), floats_of(lse)},
                              on.stream);
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      std::optional<Tensor> visible,
                                                      double dropout_p, std::optional<Tensor> seed,
                                                      bool deterministic) {
    const OnDeviceOf on(q);
    Tensor grad_q = torch::stable::new_empty(q, q.sizes());
    Tensor grad_k = torch::stable::new_empty(k, k.sizes());
    Tensor grad_v = torch::stable::new_empty(v, v.sizes());
    const launch::Attention given = attention_of(q, k, v, scale, visible, dropout_p, seed);
    Tensor workspace = floats(q, {launch::attention_backward_floats(given, deterministic)});
    launch::attention_backward(
        {given, heads_of(grad), heads_of(out), static_cast<const float*>(lse.const_data_ptr()),
         heads_of(grad_q), heads_of(grad_k), heads_of(grad_v), floats_of(workspace),
         deterministic},
        on.stream);
    return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2fast_cuda, m) {
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? visible, float dropout_p, "
        "Tensor? seed) -> (Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "float scale, Tensor? visible, float dropout_p, Tensor? seed, bool deterministic) "
        "-> (Tensor, Tensor, Tensor)");
}

GPT2FAST_CUDA_IMPL(m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace gpt2fast::binding
