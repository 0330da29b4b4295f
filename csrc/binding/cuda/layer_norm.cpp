// Residual add and layer normalization.
#include "../../launch/layer_norm.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

// x and residual are (rows, columns), their last dimension contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> residual,
                                                      Tensor weight, Tensor bias, double eps) {
    const OnDeviceOf on(x);
    check_rows(x, "x", {-1, -1});
    const int64_t rows = x.size(0), columns = x.size(1);
    if (residual.has_value()) check_rows(*residual, "residual", {rows, columns});
    check_contiguous(weight, "weight", {columns});
    check_contiguous(bias, "bias", {columns});
    check_same_type(bias, "bias", weight, "weight");
    for (const Tensor* each : {&x, residual.has_value() ? &*residual : &x, &weight, &bias}) {
        float_dtype_of(*each);
        check_device(*each, "every tensor", x, "x");
    }
    Tensor normed = torch::stable::new_empty(x, {rows, columns});
    Tensor summed = residual.has_value() ? torch::stable::new_empty(*residual, {rows, columns})
                                         : torch::stable::new_empty(x, {0});
    Tensor mean = floats(x, {rows, 1}), rstd = floats(x, {rows, 1});
    launch::layer_norm_forward(
        {x.const_data_ptr(), data_of(residual), weight.const_data_ptr(), bias.const_data_ptr(),
         normed.mutable_data_ptr(), summed.mutable_data_ptr(), floats_of(mean), floats_of(rstd),
         rows, columns, x.stride(0), stride_of(residual, 0), float(eps), dtype_of(x),
         residual.has_value() ? dtype_of(*residual) : dtype_of(x), dtype_of(weight)},
        on.stream);
    return {normed, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_normed,
                                                       std::optional<Tensor> grad_summed,
                                                       Tensor summed, Tensor mean, Tensor rstd,
                                                       Tensor weight) {
    const OnDeviceOf on(summed);
    check_rows(summed, "summed", {-1, -1});
    const int64_t rows = summed.size(0), columns = summed.size(1);
    check_rows(grad_normed, "grad_normed", {rows, columns});
    if (grad_summed.has_value()) {
        check_rows(*grad_summed, "grad_summed", {rows, columns});
        check_same_type(*grad_summed, "grad_summed", summed, "summed");
        check_device(*grad_summed, "grad_summed", summed, "summed");
    }
    check_contiguous(weight, "weight", {columns});
    for (const Tensor* each : {&grad_normed, &summed, &weight}) float_dtype_of(*each);
    for (const Tensor* each : {&mean, &rstd}) {
        check_stored(*each, "mean and rstd");
        check_floats(*each, "mean and rstd");
        GPT2FAST_CHECK(each->numel() == rows && each->is_contiguous(),
                       "mean and rstd must hold a number for each of the ", rows, " rows");
    }
    for (const Tensor* each : {&grad_normed, &mean, &rstd, &weight}) {
        check_device(*each, "every tensor", summed, "summed");
    }
    Tensor grad_input = torch::stable::new_empty(summed, {rows, columns});
    Tensor grad_weight = torch::stable::new_empty(weight, {columns});
    Tensor grad_bias = torch::stable::new_empty(weight, {columns});
    Tensor partials = floats(summed, {launch::layer_norm_partials(rows), 2, columns});
    launch::layer_norm_backward(
        {grad_normed.const_data_ptr(), data_of(grad_summed), summed.const_data_ptr(),
         static_cast<const float*>(mean.const_data_ptr()),
         static_cast<const float*>(rstd.const_data_ptr()), weight.const_data_ptr(),
         grad_input.mutable_data_ptr(), grad_weight.mutable_data_ptr(),
         grad_bias.mutable_data_ptr(), floats_of(partials), rows, columns, grad_normed.stride(0),
         stride_of(grad_summed, 0), summed.stride(0), dtype_of(grad_normed), dtype_of(summed),
         dtype_of(weight)},
        on.stream);
    return {grad_input, grad_weight, grad_bias};
}

}  // namespace

GPT2FAST_OP(layer_norm, "x, residual, weight, bias, eps");
GPT2FAST_OP(layer_norm_backward, "grad_normed, grad_summed, summed, mean, rstd, weight");

}  // namespace gpt2fast::binding
