// Embeddings.
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

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
    Tensor out = empty(wte, {tokens.numel(), wte.size(1)});
    const Embedding args{rows_of_table(tokens, "tokens", wte.size(0)),
                         rows_of_table(positions, "positions", wpe.size(0)),
                         wte.const_data_ptr(),
                         wpe.const_data_ptr(),
                         out.mutable_data_ptr(),
                         wte.size(1),
                         dtype_of(wte)};
    spread(kernels().embedding, args, tokens.numel(), wte.size(1));
    return out;
}

// The gradient of a table (rows, columns) from that of its look-ups, into `out`.
void sum_look_ups(const Tensor& grad, const Tensor& indices, const Tensor& out, bool add) {
    const int64_t rows = out.size(0);
    const int64_t* values = rows_of_table(indices, "indices", rows);
    const int64_t count = indices.numel();
    check_rows(grad, "grad", {count, out.size(1)});
    std::vector<int64_t> starts(size_t(rows) + 1), order(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) ++starts[size_t(values[i]) + 1];
    for (size_t row = 0; row < size_t(rows); ++row) starts[row + 1] += starts[row];
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t i = 0; i < count; ++i) order[size_t(next[size_t(values[i])]++)] = i;
    const EmbeddingBackward args{grad.const_data_ptr(),  starts.data(),       order.data(),
                                 out.mutable_data_ptr(), out.size(1),         grad.stride(0),
                                 float_dtype_of(grad),   float_dtype_of(out), add};
    spread(kernels().embedding_backward, args, rows, out.size(1));
}

Tensor embedding_backward(Tensor grad, Tensor indices, int64_t rows) {
    GPT2FAST_CHECK(rows >= 0, "a table of ", rows, " rows");
    check_rows(grad, "grad", {-1, -1});
    float_dtype_of(grad);
    Tensor out = empty(grad, {rows, grad.size(1)});
    sum_look_ups(grad, indices, out, false);
    return out;
}

// Adds that gradient to `total`, (rows, columns).
void embedding_backward_add(Tensor grad, Tensor indices, Tensor total) {
    check_contiguous(total, "total", {-1, -1});
    sum_look_ups(grad, indices, total, true);
}

}  // namespace

GPT2FAST_OP(embedding, "tokens, positions, wte, wpe");
GPT2FAST_OP(embedding_backward, "grad, indices, rows");
GPT2FAST_OP(embedding_backward_add, "grad, indices, total!");

}  // namespace gpt2fast::binding
