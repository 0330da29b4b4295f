// Residual add and layer normalization.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      Tensor weight, Tensor bias, double eps) {
    check_rows(x, "x", {-1, -1});
    const int64_t rows = x.size(0), columns = x.size(1);
    if (residual) check_rows(*residual, "residual", {rows, columns});
    check_contiguous(weight, "weight", {columns});
    check_contiguous(bias, "bias", {columns});
    check_same_type(bias, "bias", weight, "weight");
    for (const Tensor* each : {&x, residual ? &*residual : &x, &weight}) float_dtype_of(*each);
    Tensor normed = empty(x, x.sizes());
    Tensor summed = residual ? empty(*residual, x.sizes()) : empty(x, {0});
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
    spread(kernels().layer_norm, args, rows, columns);
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
    Tensor grad_input = empty(summed, summed.sizes());
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
    spread(kernels().layer_norm_backward, args, blocks.count, columns * (rows / blocks.count + 1));
    return {grad_input, added_blocks(sums, 0, columns, weight),
            added_blocks(sums, columns, columns, weight)};
}

}  // namespace

GPT2FAST_OP(layer_norm, "x, residual, weight, bias, eps");
GPT2FAST_OP(layer_norm_backward, "grad, grad_summed, summed, mean, rstd, weight");

}  // namespace gpt2fast::binding
