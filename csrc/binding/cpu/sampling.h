// Choosing tokens on the CPU: for rows of logits, and at the end of a step.
#pragma once

#include "../common/sampling.h"
#include "tensors.h"

namespace gpt2fast::binding {

inline void check_uniform(const Sample& args) {
    for (int64_t i = 0; args.uniform != nullptr && i < args.rows; ++i) {
        const float number = args.uniform[i * args.uniform_stride];
        GPT2FAST_CHECK(number >= 0.0f && number < 1.0f, "uniform[", i, "] = ", number,
                       " is not in [0, 1)");
    }
}

// Each row of the mask has a token.
inline void check_token_mask(const Sample& args) {
    if (args.token_mask == nullptr) return;
    const int64_t whole = args.vocab / 32;
    const uint32_t rest = (uint32_t(1) << args.vocab % 32) - 1;
    for (int64_t row = 0; row < args.rows; ++row) {
        const uint32_t* words = args.token_mask + row * args.mask_stride;
        const bool allows =
            std::any_of(words, words + whole, [](uint32_t word) { return word != 0; }) ||
            (rest != 0 && (words[whole] & rest) != 0);
        GPT2FAST_CHECK(allows, "token_mask[", row, "] allows no token");
    }
}

// Workspace for each worker of a team. Kept between steps: fresh memory of this size would
// be mapped and cleared for each.
inline uint8_t* sample_workspace(int64_t bytes) {
    thread_local std::vector<uint8_t> workspace;
    if (workspace.size() < size_t(bytes)) workspace.resize(size_t(bytes));
    return workspace.data();
}

inline void choose_rows(const Sample& args, Worker& worker, uint8_t* workspace, int64_t bytes) {
    worker.for_each(args.rows, [&](int64_t row) {
        kernels().sample(args, row, row + 1, workspace + bytes * worker.index());
    });
}

inline int64_t sample_bytes(const Sample& args) {
    return (kernels().sample_workspace(args) + 63) / 64 * 64;
}

}  // namespace gpt2fast::binding
