// Keys, values and the integers that go with them, as the launchers take them.
#pragma once

#include "../../launch/cache.h"

#include "tensors.h"

namespace gpt2fast::binding {

// The factors of an int8 cache, (rows, entries, heads) as the cache; nothing of another cache.
inline Heads<void> scales_of(const std::optional<Tensor>& x, const Tensor& cache,
                             const char* name) {
    const bool wanted = cache.scalar_type() == ScalarType::Char;
    GPT2FAST_CHECK(x.has_value() == wanted, name,
                   wanted ? " are missing: the cache is int8" : " belong to int8 caches only");
    if (!wanted) return {};
    check_stored(*x, name);
    check_device(*x, name, cache, "the cache");
    GPT2FAST_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == cache.dim() - 1, name,
                   " must be float32, one for each head's entry");
    for (int64_t i = 0; i < x->dim(); ++i) {
        GPT2FAST_CHECK(x->size(i) == cache.size(i), name, " must be a factor for ",
                       "each head's entry of the cache");
    }
    const int64_t first = x->dim() - 3;  // behind the layers, if there are any
    return {x->mutable_data_ptr(), x->stride(first), x->stride(first + 1), x->stride(first + 2)};
}

inline Heads<const void> const_scales_of(const std::optional<Tensor>& x, const Tensor& cache,
                                         const char* name) {
    return scales_of(x, cache, name).as<const void>();
}

// Of an int64 vector of `count` elements, or of any number if that is negative, where `like` is.
inline Integers integers_of(const Tensor& x, const char* name, int64_t count, const Tensor& like) {
    check_sizes(x, name, {count});
    check_integers(x, name);
    check_device(x, name, like, "the others");
    return {static_cast<const int64_t*>(x.const_data_ptr()), x.stride(0)};
}

// True if two tensors have the same sizes from dimension `first` on.
inline bool same_sizes(const Tensor& a, const Tensor& b, int64_t first = 0) {
    if (a.dim() != b.dim()) return false;
    for (int64_t i = first; i < a.dim(); ++i) {
        if (a.size(i) != b.size(i)) return false;
    }
    return true;
}

// Counters that begin at zero.
inline Tensor zeros(const Tensor& like, int64_t count) {
    return torch::stable::new_zeros(like, {count}, ScalarType::Int);
}

inline unsigned* tickets_of(const Tensor& x) {
    return static_cast<unsigned*>(x.mutable_data_ptr());
}

}  // namespace gpt2fast::binding
