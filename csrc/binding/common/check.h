// Checks of tensors before an op touches their memory: a call that Python can make
// ends in an error, not in a crash. What the op means by its arguments gpt2fast/ops checks.
//
// Refusals are exceptions of the standard library, so that their text shows neither a function nor
// the path of the file that threw them, which are those of the machine that compiled it.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../common/dtype.h"
#include "../../common/shapes.h"

namespace gpt2fast::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream text;
    text << "gpt2fast: ";
    ((text << parts), ...);
    throw std::runtime_error(text.str());
}

// The message is put together only where the condition fails.
#define GPT2FAST_CHECK(condition, ...)                              \
    do {                                                            \
        if (!(condition)) ::gpt2fast::binding::refuse(__VA_ARGS__); \
    } while (false)

// A tensor on the device of another one, contiguous and uninitialized. torch::stable::new_empty
// would look its operator up by name, under a lock, in every call.
inline Tensor allocated(const Tensor& like, const int64_t* sizes, size_t dims, int32_t dtype) {
    int32_t device_type = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
    std::array<int64_t, 8> strides;
    GPT2FAST_CHECK(dims <= strides.size(), "a tensor of ", dims, " dimensions");
    int64_t stride = 1;
    for (size_t i = dims; i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(1, sizes[i]);
    }
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(dims), sizes, strides.data(), dtype,
                                                    device_type, like.get_device_index(), &made));
    return Tensor(made);
}

// The same in the dtype of `like`.
template <typename Sizes>
Tensor empty(const Tensor& like, const Sizes& sizes) {
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    return allocated(like, sizes.data(), sizes.size(), dtype);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return empty(like, std::vector<int64_t>(sizes));
}

inline Tensor floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return allocated(like, sizes.begin(), sizes.size(), aoti_torch_dtype_float32());
}

inline Tensor int64s(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return allocated(like, sizes.begin(), sizes.size(), aoti_torch_dtype_int64());
}

inline float* floats_of(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline std::string text_of(const int64_t* sizes, int64_t count) {
    std::ostringstream text;
    text << '(';
    for (int64_t i = 0; i < count; ++i) text << (i > 0 ? ", " : "") << sizes[i];
    text << (count == 1 ? ",)" : ")");
    return text.str();
}

inline std::string sizes_of(const Tensor& x) {
    const auto sizes = x.sizes();
    return text_of(sizes.data(), int64_t(sizes.size()));
}

// The elements lie within the storage, which may have been resized since the tensor was made.
inline void check_stored(const Tensor& x, const char* name) {
    if (x.numel() == 0) return;
    int64_t bytes = 0;
    if (aoti_torch_get_storage_size(x.get(), &bytes) != AOTI_TORCH_SUCCESS) {
        refuse(name, " has no storage");
    }
    int64_t last = x.storage_offset();
    const auto sizes = x.sizes();
    const auto strides = x.strides();
    for (size_t i = 0; i < size_t(x.dim()); ++i) last += (sizes[i] - 1) * strides[i];
    const int64_t wanted = (last + 1) * int64_t(x.element_size());
    GPT2FAST_CHECK(wanted <= bytes, name, " ", sizes_of(x), " needs ", wanted,
                   " bytes of storage, which holds ", bytes, ": it was resized");
}

// A tensor of these sizes, of which -1 may be any.
inline void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
    bool same = x.dim() == int64_t(sizes.size());
    int64_t dim = 0;
    for (const int64_t size : sizes) {
        same = same && (size < 0 || x.size(dim) == size);
        ++dim;
    }
    if (!same) {
        std::string wanted = text_of(sizes.begin(), int64_t(sizes.size()));
        for (size_t at; (at = wanted.find("-1")) != std::string::npos;) wanted.replace(at, 2, "*");
        refuse(name, " must be ", wanted, ", not ", sizes_of(x));
    }
    check_stored(x, name);
}

// The same with its elements one after another in memory.
inline void check_contiguous(const Tensor& x, const char* name,
                             std::initializer_list<int64_t> sizes) {
    check_sizes(x, name, sizes);
    GPT2FAST_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// The same with only the elements of the last dimension one after another.
inline void check_rows(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
    check_sizes(x, name, sizes);
    const int64_t last = x.dim() - 1;
    GPT2FAST_CHECK(x.size(last) <= 1 || x.stride(last) == 1, name,
                   " must have a contiguous last dimension");
}

inline void check_type(const Tensor& x, const char* name, ScalarType type, const char* called) {
    GPT2FAST_CHECK(x.scalar_type() == type, name, " must be ", called);
}

inline void check_floats(const Tensor& x, const char* name) {
    check_type(x, name, ScalarType::Float, "float32");
}

inline void check_integers(const Tensor& x, const char* name) {
    check_type(x, name, ScalarType::Long, "int64");
}

inline void check_same_type(const Tensor& x, const char* name, const Tensor& like,
                            const char* other) {
    GPT2FAST_CHECK(x.scalar_type() == like.scalar_type(), name, " must have the dtype of ", other);
}

// On the device of another tensor.
inline void check_device(const Tensor& x, const char* name, const Tensor& like, const char* other) {
    GPT2FAST_CHECK(x.is_cpu() == like.is_cpu() && x.is_cuda() == like.is_cuda() &&
                       x.get_device_index() == like.get_device_index(),
                   name, " must be on the device of ", other);
}

// (batch, time, heads, head size), all alike, their last dimension contiguous.
inline void check_heads(std::initializer_list<std::pair<const Tensor*, const char*>> tensors) {
    const auto& [q, first] = *tensors.begin();
    check_rows(*q, first, {-1, -1, -1, -1});
    for (const auto& [x, name] : tensors) {
        check_rows(*x, name, {q->size(0), q->size(1), q->size(2), q->size(3)});
        check_same_type(*x, name, *q, first);
        check_device(*x, name, *q, first);
    }
}

// Keys and values beside (batch, time, heads, head size) queries: alike but for the heads, of which
// there may be fewer, each serving as many query heads as the others.
inline void check_key_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
    check_rows(k, "k", {q.size(0), q.size(1), -1, q.size(3)});
    check_same_type(k, "k", q, "q");
    check_device(k, "k", q, "q");
    check_heads({{&k, "k"}, {&v, "v"}});
    const int64_t heads = q.size(2), key_heads = k.size(2);
    GPT2FAST_CHECK(heads == key_heads || (key_heads > 0 && heads % key_heads == 0), "the ",
                   key_heads, " heads of k and v must divide the ", heads, " heads of q");
}

inline Heads<void> mutable_heads_of(const Tensor& x, const char* name) {
    check_rows(x, name, {-1, -1, -1, -1});
    return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline Heads<const void> heads_of(const Tensor& x, const char* name) {
    check_rows(x, name, {-1, -1, -1, -1});
    return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// (batch, time): which positions can be seen.
inline void check_mask(const std::optional<Tensor>& x, int64_t batch, int64_t time) {
    if (!x.has_value()) return;
    check_contiguous(*x, "mask", {batch, time});
    check_type(*x, "mask", ScalarType::Bool, "bool");
}

inline void check_probability(double p, const char* name) {
    GPT2FAST_CHECK(p >= 0.0 && p < 1.0, name, "=", p, " is not in [0, 1)");
}

}  // namespace gpt2fast::binding
