// Choosing the next token.
#include "../../launch/sampling.h"

#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Tensor sample(Tensor logits, Tensor history, std::optional<Tensor> uniform, double temperature,
              int64_t top_k, double top_p, double min_p, double repetition_penalty,
              int64_t no_repeat_ngram_size) {
    const OnDeviceOf on(logits);
    check_rows(logits, "logits", {-1, -1});
    GPT2FAST_CHECK(logits.size(1) > 0, "logits have no token to choose");
    GPT2FAST_CHECK(temperature > 0.0 && min_p >= 0.0 && repetition_penalty > 0.0 && top_p == top_p,
                   "temperature and repetition_penalty must be above 0, min_p at least 0, top_p a "
                   "number");
    launch::Sample args{};
    args.logits = logits.const_data_ptr();
    args.logits_stride = logits.stride(0);
    args.rows = logits.size(0);
    args.vocab = logits.size(1);
    args.dtype = float_dtype_of(logits);
    if (repetition_penalty != 1.0 || no_repeat_ngram_size > 0) {
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
    args.temperature = temperature;
    args.top_k = top_k;
    args.top_p = top_p;
    args.min_p = min_p;
    args.repetition_penalty = repetition_penalty;
    args.no_repeat_ngram_size = no_repeat_ngram_size;
    Tensor scores = floats(logits, {uniform.has_value() ? args.rows * args.vocab : 0});
    Tensor best = torch::stable::new_empty(logits, {args.rows, launch::sample_blocks(args.vocab)},
                                           ScalarType::Long);
    args.scores = floats_of(scores);
    args.best = best.mutable_data_ptr();
    Tensor out = torch::stable::new_empty(logits, {args.rows}, ScalarType::Long);
    args.out = static_cast<int64_t*>(out.mutable_data_ptr());
    launch::sample(args, on.stream);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2fast_cuda, m) {
    m.def(
        "sample(Tensor logits, Tensor history, Tensor? uniform, float temperature, int top_k, "
        "float top_p, float min_p, float repetition_penalty, int no_repeat_ngram_size) -> Tensor");
}

GPT2FAST_CUDA_IMPL(m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace gpt2fast::binding
