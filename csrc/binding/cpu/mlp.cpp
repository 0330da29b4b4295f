// GELU with a bias.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Tensor bias_gelu(Tensor x, Tensor bias) {
    check_rows(x, "x", {-1, -1});
    float_dtype_of(x);
    const int64_t columns = x.size(1);
    check_contiguous(bias, "bias", {columns});
    check_same_type(bias, "bias", x, "x");
    Tensor out = empty(x, x.sizes());
    const BiasGelu args{
        x.const_data_ptr(), bias.const_data_ptr(), out.mutable_data_ptr(), columns, x.stride(0),
        dtype_of(x)};
    spread(kernels().bias_gelu, args, x.size(0), columns);
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
    spread(kernels().bias_gelu_backward, args, blocks.count,
           columns * (x.size(0) / blocks.count + 1));
    return added_blocks(sums, 0, columns, bias);
}

}  // namespace

GPT2FAST_OP(bias_gelu, "x, bias");
GPT2FAST_OP(bias_gelu_backward, "grad, x, bias, grad_x!, activated!");

}  // namespace gpt2fast::binding
