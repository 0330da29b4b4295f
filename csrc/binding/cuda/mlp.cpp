// GELU with a bias, and sums of rows.
#include "../../launch/mlp.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

void check_like(const Tensor& x, const char* name, const Tensor& like,
                std::initializer_list<int64_t> sizes) {
    check_contiguous(x, name, sizes);
    check_same_type(x, name, like, "x");
    check_device(x, name, like, "x");
}

// x is (rows, columns), its last dimension contiguous.
Tensor bias_gelu(Tensor x, Tensor bias) {
    const OnDeviceOf on(x);
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    check_like(bias, "bias", x, {x.size(1)});
    Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
    launch::bias_gelu({x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), x.size(0),
                       x.size(1), x.stride(0), dtype_of(x)},
                      on.stream);
    return out;
}

// Writes grad_x, which may be grad itself, and the activation where it is wanted; returns the
// gradient of the bias. Both are contiguous.
Tensor bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor grad_x,
                          std::optional<Tensor> activated) {
    const OnDeviceOf on(x);
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    const int64_t rows = x.size(0), columns = x.size(1);
    check_rows(grad, "grad", {rows, columns});
    check_same_type(grad, "grad", x, "x");
    check_device(grad, "grad", x, "x");
    check_like(bias, "bias", x, {columns});
    check_like(grad_x, "grad_x", x, {rows, columns});
    if (activated.has_value()) check_like(*activated, "activated", x, {rows, columns});
    Tensor grad_bias = torch::stable::new_empty(bias, {columns});
    Tensor partials = floats(x, {launch::row_partials(rows), columns});
    launch::bias_gelu_backward(
        {grad.const_data_ptr(), x.const_data_ptr(), bias.const_data_ptr(),
         grad_x.mutable_data_ptr(), activated.has_value() ? activated->mutable_data_ptr() : nullptr,
         grad_bias.mutable_data_ptr(), floats_of(partials), rows, columns, grad.stride(0),
         x.stride(0), dtype_of(x)},
        on.stream);
    return grad_bias;
}

Tensor sum_rows(Tensor x) {
    const OnDeviceOf on(x);
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    Tensor out = torch::stable::new_empty(x, {x.size(1)});
    Tensor partials = floats(x, {launch::row_partials(x.size(0)), x.size(1)});
    launch::sum_rows({x.const_data_ptr(), out.mutable_data_ptr(), floats_of(partials), x.size(0),
                      x.size(1), x.stride(0), dtype_of(x)},
                     on.stream);
    return out;
}

}  // namespace

GPT2FAST_OP(bias_gelu, "x, bias");
GPT2FAST_OP(bias_gelu_backward, "grad, x, bias, grad_x!, activated!");
GPT2FAST_OP(sum_rows, "x");

}  // namespace gpt2fast::binding
