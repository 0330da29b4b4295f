// Choosing the next token.
#include "../../launch/sampling.h"

#include "../common/sampling.h"
#include "tensors.h"

namespace gpt2fast::binding {
namespace {

Tensor sample(Tensor logits, Tensor history, std::optional<Tensor> uniform,
              std::optional<Tensor> token_mask GPT2FAST_SAMPLING_PARAMETERS) {
    const OnDeviceOf on(logits);
    check_rows(logits, "logits", {-1, -1});
    Tensor out = torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Long);
    launch::Sample args{sample_args(logits, logits.size(1), history, uniform, token_mask, out,
                                    float_dtype_of(logits), GPT2FAST_SAMPLING_VALUES)};
    Tensor scores = floats(logits, {uniform.has_value() ? args.rows * args.vocab : 0});
    Tensor best = torch::stable::new_empty(logits, {args.rows, launch::sample_blocks(args.vocab)},
                                           ScalarType::Long);
    args.scores = floats_of(scores);
    args.best = best.mutable_data_ptr();
    launch::sample(args, on.stream);
    return out;
}

}  // namespace

GPT2FAST_OP(sample, "logits, history, uniform, token_mask" GPT2FAST_SAMPLING_NAMES);

}  // namespace gpt2fast::binding
