// Choosing the next token.
#include "sampling.h"

namespace gpt2fast::binding {
namespace {

Tensor sample(Tensor logits, Tensor history, std::optional<Tensor> uniform,
              std::optional<Tensor> token_mask GPT2FAST_SAMPLING_PARAMETERS) {
    check_rows(logits, "logits", {-1, -1});
    const int64_t rows = logits.size(0);
    Tensor out = int64s(logits, {rows});
    const Sample args = sample_args(logits, logits.size(1), history, uniform, token_mask, out,
                                    float_dtype_of(logits), GPT2FAST_SAMPLING_VALUES);
    check_uniform(args);
    check_token_mask(args);

    // The team, not torch's threads: those would spin on, into the model's next step.
    const int team = rows * args.vocab < worthwhile ? 1 : int(std::min<int64_t>(rows, threads()));
    const int64_t bytes = sample_bytes(args);
    uint8_t* const workspace = sample_workspace(bytes * team);
    if (team == 1) {
        kernels().sample(args, 0, rows, workspace);
    } else {
        run_team(team, [&](Worker& worker) { choose_rows(args, worker, workspace, bytes); });
    }
    return out;
}

}  // namespace

GPT2FAST_OP(sample, "logits, history, uniform, token_mask" GPT2FAST_SAMPLING_NAMES);

}  // namespace gpt2fast::binding
