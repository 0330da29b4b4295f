// Between torch's tensors and the kernels' pointers and sizes. Only the files of this folder see
// torch; gpt2fast/ops decides when their ops run and has checked what they are given.
//
// Built against torch's stable ABI, so that one binary serves many versions of torch and of Python.
// The ops live in the namespace gpt2fast_native.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../../cpu/kernels.h"
#include "../../cpu/team.h"
#include "../common/check.h"
#include "../common/registration.h"

#define GPT2FAST_OP(op, names) GPT2FAST_REGISTER(gpt2fast_native, CPU, op, names)
// An op without tensors.
#define GPT2FAST_OP_EVERYWHERE(op, names) \
    GPT2FAST_REGISTER(gpt2fast_native, CompositeExplicitAutograd, op, names)

namespace gpt2fast::binding {

inline DType dtype_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return DType::float32;
        case ScalarType::BFloat16: return DType::bfloat16;
        case ScalarType::Char: return DType::int8;
        default: refuse("the CPU kernels take float32 and bfloat16, and caches in int8");
    }
}

// The dtypes that kernels compute with: float32 and bfloat16.
inline DType float_dtype_of(const Tensor& x) {
    const DType dtype = dtype_of(x);
    GPT2FAST_CHECK(dtype != DType::int8, "the CPU kernels take float32 and bfloat16, not int8");
    return dtype;
}

inline void check_on_cpu(const Tensor& x, const char* name) {
    GPT2FAST_CHECK(x.is_cpu(), name, " must be on the CPU");
}

// Elements for which a second thread pays.
constexpr int64_t worthwhile = 32768;

// Runs a kernel over ranges of [0, items) on torch's own threads; `work` is the cost of an item in
// elements.
template <typename Args>
void spread(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items,
            int64_t work) {
    const int64_t grain = std::max<int64_t>(1, worthwhile / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, items, grain,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

inline Blocks blocks_of(int64_t rows) {
    return {rows, std::min<int64_t>(64, std::max<int64_t>(1, rows / 16))};
}

// The sums of the blocks in `sums` (blocks, stride), from column `first` on, added up.
inline Tensor added_blocks(const Tensor& sums, int64_t first, int64_t columns, const Tensor& like) {
    Tensor out = empty(like, {columns});
    const AddBlocks args{floats_of(sums) + first, out.mutable_data_ptr(), sums.size(0),
                         sums.size(1), dtype_of(like)};
    spread(kernels().add_blocks, args, columns, sums.size(0));
    return out;
}

// Threads of the team that a whole step runs on.
inline int threads() {
    static const int available = available_processors();
    return std::min(int(torch::stable::get_num_threads()), available);
}

// int64 values of a vector, checked to lie in [low, high]; `copy` holds them where they are
// strided.
inline const int64_t* checked(const Tensor& x, const char* name, int64_t size, int64_t low,
                              int64_t high, std::vector<int64_t>& copy) {
    check_on_cpu(x, name);
    check_sizes(x, name, {size});
    check_integers(x, name);
    const auto* values = static_cast<const int64_t*>(x.const_data_ptr());
    const int64_t stride = x.stride(0);
    if (stride != 1) copy.resize(size_t(size));
    for (int64_t i = 0; i < size; ++i) {
        const int64_t value = values[i * stride];
        GPT2FAST_CHECK(value >= low && value <= high, name, "[", i, "] = ", value, " is not in ",
                       low, " .. ", high);
        if (stride != 1) copy[size_t(i)] = value;
    }
    return stride == 1 ? values : copy.data();
}

}  // namespace gpt2fast::binding
