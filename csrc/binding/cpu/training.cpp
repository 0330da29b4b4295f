// Ops of the forward and backward pass.
#include "tensors.h"

#include <cmath>
#include <utility>

namespace gpt2fast::binding {
namespace {

Tensor bias_gelu(Tensor x, Tensor bias) {
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    const int64_t columns = x.size(1);
    check_contiguous(bias, "bias", {columns});
    check_same_type(bias, "bias", x, "x");
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const BiasGelu args{
        x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), columns, x.stride(0),
        dtype_of(x)};
    parallel(x.size(0), columns,
             [&](int64_t begin, int64_t end) { kernels().bias_gelu(args, begin, end); });
    return out;
}

Blocks blocks_of(int64_t rows) {
    return {rows, std::min<int64_t>(64, std::max<int64_t>(1, rows / 16))};
}

// The sums of the blocks in `sums` (blocks, stride), from column `first` on, added up.
Tensor added_blocks(const Tensor& sums, int64_t first, int64_t columns, const Tensor& like) {
    Tensor out = torch::stable::new_empty(like, {columns});
    const AddBlocks args{floats_of(sums) + first, out.mutable_data_ptr(), sums.size(0),
                         sums.size(1), dtype_of(like)};
    parallel(columns, sums.size(0),
             [&](int64_t begin, int64_t end) { kernels().add_blocks(args, begin, end); });
    return out;
}

// Writes the gradient into `grad` and, where it is given, the activation into `activated`.
Tensor bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor grad_x,
                          std::optional<Tensor> activated) {
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    const int64_t columns = x.size(1);
    check_rows(grad, "grad", {x.size(0), columns});
    check_contiguous(bias, "bias", {columns});
    check_contiguous(grad_x, "grad_x", {x.size(0), columns});
    if (activated) check_contiguous(*activated, "activated", {x.size(0), columns});
    for (const Tensor* each : {&grad, &bias, &grad_x, activated ? &*activated : &grad}) {
        check_same_type(*each, "every tensor", x, "x");
    }
    const Blocks blocks = blocks_of(x.size(0));
    const Tensor sums = floats(x, {blocks.count, columns});
    const BiasGeluBackward args{grad.const_data_ptr(),
                                x.const_data_ptr(),
                                bias.const_data_ptr(),
                                grad_x.mutable_data_ptr(),
                                activated ? activated->mutable_data_ptr() : nullptr,
                                floats_of(sums),
                                blocks,
                                columns,
                                grad.stride(0),
                                x.stride(0),
                                dtype_of(x)};
    parallel(blocks.count, columns * (x.size(0) / blocks.count + 1),
             [&](int64_t begin, int64_t end) { kernels().bias_gelu_backward(args, begin, end); });
    return added_blocks(sums, 0, columns, bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      Tensor weight, Tensor bias, double eps) {
    check_rows(x, "x", {-1, -1});
    const int64_t rows = x.size(0), columns = x.size(1);
    if (residual) check_rows(*residual, "residual", {rows, columns});
    check_contiguous(weight, "weight", {columns});
    check_contiguous(bias, "bias", {columns});
    check_same_type(bias, "bias", weight, "weight");
    for (const Tensor* each : {&x, residual ? &*residual : &x, &weight}) float_dtype_of(*each);
    Tensor normed = torch::stable::new_empty(x, x.sizes());
    Tensor summed = residual ? torch::stable::new_empty(*residual, x.sizes())
                             : torch::stable::new_empty(x, {0});
    Tensor mean = floats(x, {rows}), rstd = floats(x, {rows});
    const LayerNorm args{x.const_data_ptr(),
                         residual ? residual->const_data_ptr() : nullptr,
                         weight.const_data_ptr(),
                         bias.const_data_ptr(),
                         normed.mutable_data_ptr(),
                         summed.mutable_data_ptr(),
                         floats_of(mean),
                         floats_of(rstd),
                         columns,
                         x.stride(0),
                         residual ? residual->stride(0) : 0,
                         float(eps),
                         dtype_of(x),
                         dtype_of(residual ? *residual : x),
                         dtype_of(weight)};
    parallel(rows, columns,
             [&](int64_t begin, int64_t end) { kernels().layer_norm(args, begin, end); });
    return {normed, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad,
                                                       std::optional<Tensor> grad_summed,
                                                       Tensor summed, Tensor mean, Tensor rstd,
                                                       Tensor weight) {
    check_rows(summed, "summed", {-1, -1});
    const int64_t rows = summed.size(0), columns = summed.size(1);
    check_rows(grad, "grad_normed", {rows, columns});
    if (grad_summed) {
        check_rows(*grad_summed, "grad_summed", {rows, columns});
        check_same_type(*grad_summed, "grad_summed", summed, "summed");
    }
    check_contiguous(weight, "weight", {columns});
    for (const Tensor* each : {&grad, &summed, &weight}) float_dtype_of(*each);
    for (const auto& [each, name] : {std::pair(&mean, "mean"), std::pair(&rstd, "rstd")}) {
        check_stored(*each, name);
        check_floats(*each, name);
        GPT2FAST_CHECK(each->numel() == rows && each->is_contiguous(), name,
                       " must hold a number for each of the ", rows, " rows, contiguous");
    }
    const Blocks blocks = blocks_of(rows);
    Tensor grad_input = torch::stable::new_empty(summed, summed.sizes());
    const Tensor sums = floats(summed, {blocks.count, 2 * columns});
    const LayerNormBackward args{grad.const_data_ptr(),
                                 grad_summed ? grad_summed->const_data_ptr() : nullptr,
                                 summed.const_data_ptr(),
                                 weight.const_data_ptr(),
                                 floats_of(mean),
                                 floats_of(rstd),
                                 grad_input.mutable_data_ptr(),
                                 floats_of(sums),
                                 blocks,
                                 columns,
                                 grad.stride(0),
                                 grad_summed ? grad_summed->stride(0) : 0,
                                 summed.stride(0),
                                 dtype_of(grad),
                                 dtype_of(summed),
                                 dtype_of(weight)};
    parallel(blocks.count, columns * (rows / blocks.count + 1),
             [&](int64_t begin, int64_t end) { kernels().layer_norm_backward(args, begin, end); });
    return {grad_input, added_blocks(sums, 0, columns, weight),
            added_blocks(sums, columns, columns, weight)};
}

Heads heads_of(const Tensor& x) {
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Attention attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
                         double scale, const std::optional<Tensor>& visible, double dropout,
                         int64_t seed) {
    check_mask(visible, q.size(0), q.size(1));
    check_probability(dropout, "dropout_p");
    Attention args{};
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
    args.lse = floats_of(lse);
    args.visible = visible ? static_cast<const uint8_t*>(visible->const_data_ptr()) : nullptr;
    args.batch = q.size(0);
    args.time = q.size(1);
    args.heads = q.size(2);
    args.head_dim = q.size(3);
    args.scale = float(scale);
    args.dropout = float(dropout);
    args.seed = uint64_t(seed);
    args.dtype = dtype_of(q);
    return args;
}

// (batch, time, heads, head size), all alike, the last dimension contiguous.
void check_heads(std::initializer_list<std::pair<const Tensor*, const char*>> tensors) {
    const Tensor& q = *tensors.begin()->first;
    check_rows(q, tensors.begin()->second, {-1, -1, -1, -1});
    float_dtype_of(q);
    for (const auto& [x, name] : tensors) {
        check_rows(*x, name, {q.size(0), q.size(1), q.size(2), q.size(3)});
        check_same_type(*x, name, q, tensors.begin()->second);
    }
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale,
                                     std::optional<Tensor> visible, double dropout, int64_t seed) {
    check_heads({{&q, "q"}, {&k, "k"}, {&v, "v"}});
    Tensor out = torch::stable::new_empty(q, q.sizes());
    Tensor lse = floats(q, {q.size(0), q.size(2), q.size(1)});
    Attention args = attention_args(q, k, v, lse, scale, visible, dropout, seed);
    args.out = out.mutable_data_ptr();
    const int64_t blocks = (args.time + attention_queries - 1) / attention_queries;
    parallel(args.batch * args.heads * blocks, attention_queries * args.time * args.head_dim / 16,
             [&](int64_t begin, int64_t end) { kernels().attention(args, begin, end); });
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, double scale,
                                                      std::optional<Tensor> visible, double dropout,
                                                      int64_t seed) {
    check_heads({{&q, "q"}, {&k, "k"}, {&v, "v"}, {&grad, "grad"}, {&out, "out"}});
    check_contiguous(lse, "lse", {q.size(0), q.size(2), q.size(1)});
    check_floats(lse, "lse");
    Tensor grad_q = torch::stable::new_empty(q, q.sizes());
    Tensor grad_k = torch::stable::new_empty(k, k.sizes());
    Tensor grad_v = torch::stable::new_empty(v, v.sizes());
    const AttentionBackward args{attention_args(q, k, v, lse, scale, visible, dropout, seed),
                                 heads_of(grad),
                                 heads_of(out),
                                 grad_q.mutable_data_ptr(),
                                 grad_k.mutable_data_ptr(),
                                 grad_v.mutable_data_ptr()};
    parallel(q.size(0) * q.size(2), q.size(1) * q.size(1) * q.size(3) / 16,
             [&](int64_t begin, int64_t end) { kernels().attention_backward(args, begin, end); });
    return {grad_q, grad_k, grad_v};
}

// Losses of rows of logits; with `differentiate` their gradients times `factor` take their place.
void cross_entropy(Tensor logits, Tensor targets, Tensor losses, int64_t ignore_index,
                   double factor, bool differentiate) {
    check_contiguous(logits, "logits", {-1, -1});
    float_dtype_of(logits);
    const int64_t rows = logits.size(0), columns = logits.size(1);
    check_contiguous(targets, "targets", {rows});
    check_integers(targets, "targets");
    check_contiguous(losses, "losses", {rows});
    check_floats(losses, "losses");
    const auto* classes = static_cast<const int64_t*>(targets.const_data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
        GPT2FAST_CHECK(classes[i] == ignore_index || (classes[i] >= 0 && classes[i] < columns),
                       "targets[", i, "] = ", classes[i], " is neither a class in 0 .. ",
                       columns - 1, " nor ignore_index=", ignore_index);
    }
    const CrossEntropy args{logits.mutable_data_ptr(),
                            classes,
                            floats_of(losses),
                            columns,
                            ignore_index,
                            float(factor),
                            differentiate,
                            dtype_of(logits)};
    parallel(rows, columns,
             [&](int64_t begin, int64_t end) { kernels().cross_entropy(args, begin, end); });
}

void adamw(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
           std::vector<Tensor> exp_avg_sqs, int64_t step, double lr, double beta1, double beta2,
           double eps, double weight_decay) {
    constexpr int64_t piece_size = 16384;
    std::vector<AdamWPiece> pieces;
    GPT2FAST_CHECK(grads.size() == params.size() && exp_avgs.size() == params.size() &&
                       exp_avg_sqs.size() == params.size(),
                   "params, grads, exp_avgs and exp_avg_sqs must have equal lengths");
    for (size_t i = 0; i < params.size(); ++i) {
        const DType dtype = float_dtype_of(params[i]);
        for (const Tensor* each : {&params[i], &grads[i], &exp_avgs[i], &exp_avg_sqs[i]}) {
            check_stored(*each, "a parameter, gradient or moment");
            check_same_type(*each, "gradients and moments", params[i], "their parameter");
            GPT2FAST_CHECK(each->numel() == params[i].numel() && each->is_contiguous(),
                           "a parameter, its gradient and its moments must have one size and be "
                           "contiguous");
        }
        const int64_t bytes = dtype == DType::float32 ? 4 : 2;
        for (int64_t at = 0; at < params[i].numel(); at += piece_size) {
            const auto place = [&](const Tensor& x) {
                return static_cast<uint8_t*>(x.mutable_data_ptr()) + at * bytes;
            };
            pieces.push_back({place(params[i]),
                              static_cast<const uint8_t*>(grads[i].const_data_ptr()) + at * bytes,
                              place(exp_avgs[i]), place(exp_avg_sqs[i]),
                              std::min(piece_size, params[i].numel() - at), dtype});
        }
    }
    const AdamW args{pieces.data(),
                     float(beta1),
                     float(beta2),
                     float(1.0 - beta1),
                     float(1.0 - beta2),
                     float(1.0 - lr * weight_decay),
                     float(lr / (1.0 - std::pow(beta1, double(step)))),
                     float(1.0 / std::sqrt(1.0 - std::pow(beta2, double(step)))),
                     float(eps)};
    parallel(int64_t(pieces.size()), piece_size,
             [&](int64_t begin, int64_t end) { kernels().adamw(args, begin, end); });
}

// Checks that look-ups lie inside their table.
const int64_t* rows_of_table(const Tensor& indices, const char* name, int64_t rows) {
    check_stored(indices, name);
    check_integers(indices, name);
    GPT2FAST_CHECK(indices.is_contiguous(), name, " must be contiguous");
    const auto* values = static_cast<const int64_t*>(indices.const_data_ptr());
    const int64_t count = indices.numel();
    for (int64_t i = 0; i < count; ++i) {
        GPT2FAST_CHECK(values[i] >= 0 && values[i] < rows, name, "[", i, "] = ", values[i],
                       " is not in 0 .. ", rows - 1);
    }
    return values;
}

// tokens and positions hold one int64 for each row of the result.
Tensor embedding(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) {
    check_contiguous(wte, "wte", {-1, -1});
    check_contiguous(wpe, "wpe", {-1, wte.size(1)});
    float_dtype_of(wte);
    check_same_type(wpe, "wpe", wte, "wte");
    GPT2FAST_CHECK(positions.numel() == tokens.numel(), "there must be a position for each token");
    Tensor out = torch::stable::new_empty(wte, {tokens.numel(), wte.size(1)});
    const Embedding args{rows_of_table(tokens, "tokens", wte.size(0)),
                         rows_of_table(positions, "positions", wpe.size(0)),
                         wte.const_data_ptr(),
                         wpe.const_data_ptr(),
                         out.mutable_data_ptr(),
                         wte.size(1),
                         dtype_of(wte)};
    parallel(tokens.numel(), wte.size(1),
             [&](int64_t begin, int64_t end) { kernels().embedding(args, begin, end); });
    return out;
}

// The gradient of a table of `rows` rows from that of its look-ups.
Tensor embedding_backward(Tensor grad, Tensor indices, int64_t rows) {
    GPT2FAST_CHECK(rows >= 0, "a table of ", rows, " rows");
    const int64_t* values = rows_of_table(indices, "indices", rows);
    const int64_t count = indices.numel();
    check_rows(grad, "grad", {count, -1});
    float_dtype_of(grad);
    std::vector<int64_t> starts(size_t(rows) + 1), order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ++starts[size_t(values[i]) + 1];
    for (size_t row = 0; row < size_t(rows); ++row) starts[row + 1] += starts[row];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[size_t(next[size_t(values[i])]++)] = i;
    Tensor out = torch::stable::new_empty(grad, {rows, grad.size(1)});
    const EmbeddingBackward args{grad.const_data_ptr(),  starts.data(), order.data(),
                                 out.mutable_data_ptr(), grad.size(1),  grad.stride(0),
                                 dtype_of(grad)};
    parallel(rows, grad.size(1),
             [&](int64_t begin, int64_t end) { kernels().embedding_backward(args, begin, end); });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2fast_native, m) {
    m.def("bias_gelu(Tensor x, Tensor bias) -> Tensor");
    m.def(
        "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor(a!) grad_x, "
        "Tensor(b!)? activated) -> Tensor");
    m.def(
        "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "layer_norm_backward(Tensor grad, Tensor? grad_summed, Tensor summed, Tensor mean, "
        "Tensor rstd, Tensor weight) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? visible, float dropout, "
        "int seed) -> (Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "float scale, Tensor? visible, float dropout, int seed) -> (Tensor, Tensor, Tensor)");
    m.def(
        "cross_entropy(Tensor(a!) logits, Tensor targets, Tensor(b!) losses, int ignore_index, "
        "float factor, bool differentiate) -> ()");
    m.def(
        "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, int step, float lr, float beta1, float beta2, float eps, "
        "float weight_decay) -> ()");
    m.def("embedding(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) -> Tensor");
    m.def("embedding_backward(Tensor grad, Tensor indices, int rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CPU, m) {
    m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
    m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
    m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
    m.impl("adamw", TORCH_BOX(&adamw));
    m.impl("embedding", TORCH_BOX(&embedding));
    m.impl("embedding_backward", TORCH_BOX(&embedding_backward));
}

}  // namespace gpt2fast::binding
