// Matrix products by cuBLASLt. Each op says whether it was possible: where not, nothing is written.
#include "../../launch/cublaslt.h"

#include <memory>
#include <string>

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

launch::Operand operand_of(const Tensor& x) {
    return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

bool multiply(const Tensor& a, const Tensor& b, const Tensor& out, launch::Epilogue epilogue,
              void* bias, void* inner) {
    const OnDeviceOf on(a);
    const int64_t columns = b.dim() == 2 ? b.size(1) : 0;
    check_sizes(a, "a", {-1, -1});
    check_sizes(b, "b", {a.size(1), -1});
    check_contiguous(out, "out", {a.size(0), columns});
    GPT2FAST_CHECK(float_dtype_of(a) == float_dtype_of(b) && dtype_of(a) == dtype_of(out),
                   "a product's factors and result must have one dtype");
    for (const Tensor* each : {&b, &out}) check_device(*each, "b and out", a, "a");
    const launch::Matmul matmul{
        operand_of(a), operand_of(b), out.mutable_data_ptr(), epilogue, bias,
        inner,         dtype_of(a),   a.get_device_index()};
    launch::MatmulPlan plan;
    if (!launch::plan_matmul(matmul, plan)) return false;
    // torch aligns to more on a GPU, to less on a CPU.
    size_t room = plan.workspace_bytes + launch::workspace_alignment;
    Tensor workspace = torch::stable::new_empty(a, {int64_t(room)}, ScalarType::Byte);
    void* aligned = workspace.mutable_data_ptr();
    std::align(launch::workspace_alignment, plan.workspace_bytes, aligned, room);
    launch::run_matmul(matmul, plan, aligned, on.stream);
    return true;
}

int64_t columns_of(const Tensor& b) {
    check_sizes(b, "b", {-1, -1});
    return b.size(1);
}

int64_t rows_of(const Tensor& a) {
    check_sizes(a, "a", {-1, -1});
    return a.size(0);
}

void check_like(const Tensor& x, const char* name, const Tensor& a,
                std::initializer_list<int64_t> sizes) {
    check_contiguous(x, name, sizes);
    check_same_type(x, name, a, "a");
    check_device(x, name, a, "a");
}

// The launchers take pointers to non-const even to what they only read, as cuBLASLt's API does.
void* read(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

std::string cublaslt_missing(Tensor x) {
    const OnDeviceOf on(x);
    return launch::cublaslt_missing(x.get_device_index());
}

// a is (m, k), b (k, n), one dimension of each contiguous; all the others are contiguous.
bool cublaslt_bias(Tensor a, Tensor b, Tensor bias, Tensor out) {
    check_like(bias, "bias", a, {columns_of(b)});
    return multiply(a, b, out, launch::Epilogue::bias, read(bias), nullptr);
}

bool cublaslt_bias_gelu(Tensor a, Tensor b, Tensor bias, Tensor out, std::optional<Tensor> inner) {
    check_like(bias, "bias", a, {columns_of(b)});
    if (inner.has_value()) check_like(*inner, "inner", a, {rows_of(a), columns_of(b)});
    return multiply(a, b, out, launch::Epilogue::gelu_bias, read(bias),
                    inner.has_value() ? inner->mutable_data_ptr() : nullptr);
}

bool cublaslt_gelu_gradient(Tensor a, Tensor b, Tensor inner, Tensor out, Tensor sums) {
    check_like(inner, "inner", a, {rows_of(a), columns_of(b)});
    check_like(sums, "sums", a, {columns_of(b)});
    return multiply(a, b, out, launch::Epilogue::gelu_gradient, sums.mutable_data_ptr(),
                    read(inner));
}

bool cublaslt_column_sums(Tensor a, Tensor b, Tensor out, Tensor sums) {
    check_like(sums, "sums", a, {columns_of(b)});
    return multiply(a, b, out, launch::Epilogue::column_sums, sums.mutable_data_ptr(), nullptr);
}

}  // namespace

GPT2FAST_OP(cublaslt_missing, "x");
GPT2FAST_OP(cublaslt_bias, "a, b, bias, out!");
GPT2FAST_OP(cublaslt_bias_gelu, "a, b, bias, out!, inner!");
GPT2FAST_OP(cublaslt_gelu_gradient, "a, b, inner, out!, sums!");
GPT2FAST_OP(cublaslt_column_sums, "a, b, out!, sums!");

}  // namespace gpt2fast::binding
