// Embeddings.
#include "../../launch/embedding.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

const int64_t* indices_of(const Tensor& x, int64_t count, const Tensor& like) {
    check_stored(x, "indices");
    check_device(x, "indices", like, "the table");
    GPT2FAST_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == count,
                   "indices must be contiguous int64, ", count, " of them");
    return static_cast<const int64_t*>(x.const_data_ptr());
}

// tokens and positions hold one int64 for each row of the result.
Tensor embedding(Tensor tokens, Tensor positions, Tensor wte, Tensor wpe) {
    const OnDeviceOf on(wte);
    check_contiguous(wte, "wte", {-1, -1});
    check_contiguous(wpe, "wpe", {-1, wte.size(1)});
    check_same_type(wpe, "wpe", wte, "wte");
    check_device(wpe, "wpe", wte, "wte");
    const int64_t count = tokens.numel();
    Tensor out = torch::stable::new_empty(wte, {tokens.numel(), wte.size(1)});
    launch::embedding_forward(
        {indices_of(tokens, count, wte), indices_of(positions, count, wte), wte.const_data_ptr(),
         wpe.const_data_ptr(), out.mutable_data_ptr(), tokens.numel(), wte.size(1), wte.size(0),
         wpe.size(0), float_dtype_of(wte)},
        on.stream);
    return out;
}

// The gradient of a table of `rows` rows; `sorted` and `order` are what a stable sort of the
// indices gives.
Tensor embedding_backward(Tensor grad, Tensor sorted, Tensor order, int64_t rows) {
    const OnDeviceOf on(grad);
    GPT2FAST_CHECK(rows >= 0, "a table of ", rows, " rows");
    check_rows(grad, "grad", {sorted.numel(), -1});
    Tensor grad_table = torch::stable::new_zeros(grad, {rows, grad.size(1)});
    Tensor partials = floats(grad, {launch::embedding_partials(sorted.numel()), grad.size(1)});
    launch::embedding_backward(
        {grad.const_data_ptr(), indices_of(sorted, grad.size(0), grad),
         indices_of(order, grad.size(0), grad), grad_table.mutable_data_ptr(), floats_of(partials),
         sorted.numel(), grad.size(1), grad.stride(0), float_dtype_of(grad)},
        on.stream);
    return grad_table;
}

}  // namespace

GPT2FAST_OP(embedding, "tokens, positions, wte, wpe");
GPT2FAST_OP(embedding_backward, "grad, sorted, order, rows");

}  // namespace gpt2fast::binding
