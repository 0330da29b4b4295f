// One whole step of GPT-2.
#include "../../launch/decode.h"

#include "caches.h"

namespace gpt2fast::binding {
namespace {

constexpr size_t layer_weights = 12;

launch::MatrixOf matrix_of(const Tensor& x, int64_t rows, int64_t columns) {
    check_rows(x, "a weight", {rows, columns});
    return {x.const_data_ptr(), x.stride(0)};
}

Heads<void> layer_of(const Tensor& cache, size_t layer) {
    auto* data = static_cast<uint8_t*>(cache.mutable_data_ptr());
    const int64_t bytes = int64_t(layer) * cache.stride(0) * int64_t(cache.element_size());
    return {data + bytes, cache.stride(1), cache.stride(2), cache.stride(3)};
}

Heads<void> layer_of(const std::optional<Tensor>& scales, Heads<void> all, size_t layer) {
    if (scales.has_value()) {
        all.data = static_cast<float*>(all.data) + int64_t(layer) * scales->stride(0);
    }
    return all;
}

// The weights as gpt2fast/ops/decode.py lists them; vectors are contiguous.
Tensor decode_step(std::vector<Tensor> weights, Tensor k_cache, Tensor v_cache, Tensor tokens,
                   Tensor positions, Tensor lengths, std::vector<double> scales, double eps,
                   std::optional<Tensor> k_scales, std::optional<Tensor> v_scales) {
    GPT2FAST_CHECK(!scales.empty() && weights.size() == 5 + layer_weights * scales.size(),
                   weights.size(), " weights for ", scales.size(), " layers");
    const Tensor& wte = weights[0];
    const OnDeviceOf on(wte);
    check_rows(wte, "wte", {-1, -1});
    float_dtype_of(wte);
    for (const Tensor& each : weights) {
        check_same_type(each, "a weight", wte, "wte");
        check_device(each, "a weight", wte, "wte");
    }
    for (const Tensor* each : {&k_cache, &v_cache}) {
        check_stored(*each, "a cache");
        check_device(*each, "a cache", wte, "wte");
    }
    const int64_t width = wte.size(1);
    GPT2FAST_CHECK(
        k_cache.dim() == 5 && (k_cache.size(4) == 1 || k_cache.stride(4) == 1) &&
            (v_cache.dim() == 5 && (v_cache.size(4) == 1 || v_cache.stride(4) == 1)) &&
            same_sizes(k_cache, v_cache) && k_cache.scalar_type() == v_cache.scalar_type() &&
            k_cache.size(0) == int64_t(scales.size()) && k_cache.size(1) == tokens.numel() &&
            k_cache.size(3) * k_cache.size(4) == wte.size(1),
        "caches must be (layers, rows, entries, heads, head size)");
    const Heads<void> factors[] = {scales_of(k_scales, k_cache, "k_scales"),
                                   scales_of(v_scales, v_cache, "v_scales")};
    launch::DecodeStep args{};
    std::vector<launch::DecodeLayer> layers(scales.size());
    for (size_t i = 0; i < layers.size(); ++i) {
        const Tensor* of_layer = weights.data() + 2 + i * layer_weights;
        check_rows(of_layer[8], "a weight", {width, -1});
        const int64_t inner = of_layer[8].size(1);
        GPT2FAST_CHECK(i == 0 || inner == args.inner, "all layers must be alike");
        const auto vector = [&](size_t n, int64_t size) {
            check_contiguous(of_layer[n], "a weight", {size});
            return of_layer[n].const_data_ptr();
        };
        layers[i] = {vector(0, width),
                     vector(1, width),
                     matrix_of(of_layer[2], width, 3 * width),
                     vector(3, 3 * width),
                     matrix_of(of_layer[4], width, width),
                     vector(5, width),
                     vector(6, width),
                     vector(7, width),
                     matrix_of(of_layer[8], width, inner),
                     vector(9, inner),
                     matrix_of(of_layer[10], inner, width),
                     vector(11, width),
                     {layer_of(k_cache, i), layer_of(v_cache, i)},
                     {layer_of(k_scales, factors[0], i), layer_of(v_scales, factors[1], i)},
                     float(scales[i])};
        args.inner = inner;
    }
    const Tensor* last = weights.data() + weights.size() - 3;
    args.wte = matrix_of(wte, -1, width);
    args.wpe = matrix_of(weights[1], -1, width);
    args.wte_rows = wte.size(0);
    args.wpe_rows = weights[1].size(0);
    args.layers = layers.data();
    args.layer_count = int64_t(layers.size());
    check_contiguous(last[0], "ln_f.weight", {width});
    check_contiguous(last[1], "ln_f.bias", {width});
    args.ln_f_weight = last[0].const_data_ptr();
    args.ln_f_bias = last[1].const_data_ptr();
    args.projection = matrix_of(last[2], -1, width);
    args.batch = tokens.numel();
    args.tokens = integers_of(tokens, "tokens", args.batch, wte);
    args.positions = integers_of(positions, "positions", args.batch, wte);
    args.lengths = integers_of(lengths, "lengths", args.batch, wte);
    args.width = width;
    args.entries = k_cache.size(2);
    args.heads = k_cache.size(3);
    args.head_dim = k_cache.size(4);
    args.vocab = last[2].size(0);
    args.eps = float(eps);
    args.dtype = dtype_of(wte);
    args.cache_dtype = dtype_of(k_cache);
    Tensor logits = torch::stable::new_empty(wte, {args.batch, args.vocab});
    Tensor work = floats(wte, {launch::decode_work(args)});
    Tensor tickets = zeros(wte, launch::decode_tickets(args));
    args.logits = logits.mutable_data_ptr();
    args.work = floats_of(work);
    args.tickets = tickets_of(tickets);
    launch::decode_step(args, on.stream);
    return logits;
}

}  // namespace

GPT2FAST_OP(decode_step,
            "weights, k_cache!, v_cache!, tokens, positions, lengths, scales, eps, k_scales!=None, "
            "v_scales!=None");

}  // namespace gpt2fast::binding
