#include "sampling.h"

#include <algorithm>
#include <limits>

#include "../kernels/sampling.cuh"
#include "dispatch.h"

namespace gpt2fast::launch {
namespace {

using namespace kernels;

int at_most_int(int64_t value) {
    return int(std::min<int64_t>(value, std::numeric_limits<int>::max()));
}

}  // namespace

int64_t sample_blocks(int64_t vocab) { return ceil_div(vocab, scored_tokens); }

void sample(const Sample& args, void* stream) {
    if (args.rows == 0) return;
    if (args.vocab < 1 || args.vocab > std::numeric_limits<int>::max()) {
        throw std::invalid_argument("a vocabulary without tokens, or of more than 2^31");
    }
    if (args.rows > 65535) throw std::invalid_argument("more rows than a grid has blocks");
    const bool greedy = args.uniform == nullptr;
    const bool reads_history = args.history_length > 0 && args.reads_history();
    const int64_t blocks = sample_blocks(args.vocab);
    auto* best = static_cast<unsigned long long*>(args.best);
    with_float(args.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const ScoredRows<T> rows{static_cast<const T*>(args.logits),
                                 args.logits_stride,
                                 int(args.vocab),
                                 reads_history ? args.history : nullptr,
                                 args.history_stride,
                                 args.history_step,
                                 at_most_int(args.history_length),
                                 float(args.repetition_penalty),
                                 at_most_int(args.no_repeat_ngram_size),
                                 float(args.temperature),
                                 args.token_mask,
                                 args.mask_stride,
                                 greedy ? nullptr : args.scores,
                                 best};
        device::launch(&score_tokens<T>, dim3(unsigned(blocks), unsigned(args.rows)),
                       dim3(scored_threads), size_t(scored_shared), device::stream_of(stream),
                       rows);
    });
    if (greedy) {
        device::launch(&choose_highest, dim3(unsigned(args.rows)), dim3(32), 0,
                       device::stream_of(stream), best, int(blocks), args.out);
        return;
    }
    const DrawnRows rows{args.scores,       best,
                         int(blocks),       int(args.vocab),
                         args.uniform,      args.uniform_stride,
                         args.out,          args.top_k < args.vocab ? at_most_int(args.top_k) : 0,
                         args.top_p < 1.0,  float(1.0 - args.top_p),
                         float(args.min_p), float(1.0 - args.typical_p)};
    device::launch(args.typical_p < 1.0 ? &draw_tokens<true> : &draw_tokens<false>,
                   dim3(unsigned(args.rows)), dim3(draw_threads), sizeof(DrawShared),
                   device::stream_of(stream), rows);
}

}  // namespace gpt2fast::launch
