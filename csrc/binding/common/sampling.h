// The arguments of the ops that choose tokens.
#pragma once

#include <cmath>

#include "../../common/sampling.h"
#include "check.h"

namespace gpt2fast::binding {

// For the parameters of a function that takes the options last, for their values there, and for
// their names in its schema.
#define GPT2FAST_PARAMETER(Type, option, neutral) , Type option
#define GPT2FAST_VALUE(Type, option, neutral) option,
#define GPT2FAST_NAME_OF(Type, option, neutral) ", " #option
#define GPT2FAST_SAMPLING_PARAMETERS GPT2FAST_SAMPLING_OPTIONS(GPT2FAST_PARAMETER)
#define GPT2FAST_SAMPLING_VALUES \
    SamplingOptions { GPT2FAST_SAMPLING_OPTIONS(GPT2FAST_VALUE) }
#define GPT2FAST_SAMPLING_NAMES GPT2FAST_SAMPLING_OPTIONS(GPT2FAST_NAME_OF)

// As gpt2fast/ops/sampling.py does, whose messages say more.
inline void check_options(const SamplingOptions& given) {
    const auto is_positive = [](double x) { return x > 0.0 && std::isfinite(x); };
    GPT2FAST_CHECK(is_positive(given.temperature) && is_positive(given.repetition_penalty),
                   "temperature and repetition_penalty must be finite numbers above 0");
    GPT2FAST_CHECK(
        given.top_p >= 0.0 && given.top_p <= 1.0 && given.min_p >= 0.0 && given.min_p <= 1.0,
        "top_p and min_p must be in [0, 1]");
    GPT2FAST_CHECK(given.typical_p > 0.0 && given.typical_p <= 1.0, "typical_p must be in (0, 1]");
    GPT2FAST_CHECK(given.top_k >= 0 && given.no_repeat_ngram_size >= 0,
                   "top_k and no_repeat_ngram_size must be 0 at least");
}

// Of logits (rows, vocab or more); `out` is int64 (rows).
inline Sample sample_args(const Tensor& logits, int64_t vocab, const Tensor& history,
                          const std::optional<Tensor>& uniform,
                          const std::optional<Tensor>& token_mask, Tensor& out, DType dtype,
                          const SamplingOptions& options) {
    GPT2FAST_CHECK(vocab > 0, "logits have no token to choose");
    check_options(options);
    Sample args{options};
    args.logits = logits.const_data_ptr();
    args.rows = logits.size(0);
    args.vocab = vocab;
    args.logits_stride = logits.stride(0);
    args.dtype = dtype;
    if (options.reads_history()) {
        check_sizes(history, "history", {args.rows, -1});
        check_integers(history, "history");
        check_device(history, "history", logits, "logits");
        args.history = static_cast<const int64_t*>(history.const_data_ptr());
        args.history_length = history.size(1);
        args.history_stride = history.stride(0);
        args.history_step = history.stride(1);
    }
    if (uniform.has_value()) {
        check_sizes(*uniform, "uniform", {args.rows});
        check_floats(*uniform, "uniform");
        check_device(*uniform, "uniform", logits, "logits");
        args.uniform = static_cast<const float*>(uniform->const_data_ptr());
        args.uniform_stride = uniform->stride(0);
    }
    if (token_mask.has_value()) {
        check_rows(*token_mask, "token_mask", {args.rows, (vocab + 31) / 32});
        check_type(*token_mask, "token_mask", ScalarType::Int, "int32");
        check_device(*token_mask, "token_mask", logits, "logits");
        args.token_mask = static_cast<const uint32_t*>(token_mask->const_data_ptr());
        args.mask_stride = token_mask->stride(0);
    }
    args.out = static_cast<int64_t*>(out.mutable_data_ptr());
    return args;
}

}  // namespace gpt2fast::binding
