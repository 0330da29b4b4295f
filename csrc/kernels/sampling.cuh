// Choosing the next token of each row of logits; nothing is copied to the host.
//
// A row of V logits is read once (200 KB for GPT-2 in float32), its scores are written and, unless
// the choice is greedy, read again from L2 by each pass that looks for the edge of top-k or top-p
// (three a piece, mostly) and twice by the draw. A weight costs one exponential. A row is one
// block's after the first kernel, bound by what an SM reads from L2, some 64 bytes a clock: about
// 2 us a pass at V = 50257. Not yet run on a GPU.
//
// Both edges are the first score, in ascending order, up to which a mass exceeds a limit: a count
// for top-k, a sum of weights for top-p. A pass sums the masses of 2048 ranges of scores and
// narrows down to the one that holds the edge: first ranges of equal width below the highest score,
// over which logits spread well enough that atomics rarely meet, then ranges of float32's own
// order, until one score is left. Weights are summed as whole multiples of 2^-40: exactly, so that
// the order of the atomics doesn't matter. Of scores equal to top-p's edge those of lower tokens
// are left out first.
// The draw sums the kept weights in float64, warp after warp in a fixed order, and walks through
// the stretch of the one warp that the random number falls into.
#pragma once

#include "cache.cuh"

namespace gpt2fast::kernels {

constexpr int scored_threads = 256;
constexpr int scored_tokens = 2048;  // of a block

template <typename T>
struct ScoredRows {
    const T* logits;
    int64_t logits_stride;
    int vocab;
    const int64_t* history;  // null: nothing depends on it
    int64_t history_stride, history_step;
    int history_length;
    float repetition_penalty;
    int no_repeat_ngram_size;
    float temperature;
    const uint32_t* token_mask;  // bit i % 32 of word i / 32 allows token i; null: all may be
    int64_t mask_stride;
    float* scores;             // (rows, vocab), or null: only the best are wanted
    unsigned long long* best;  // (rows, blocks of scored_tokens)
};

constexpr float largest_float = 0x1.fffffep127f;

// A number whose order is that of the scores; NaN is the highest, and the two zeros are one.
__device__ __forceinline__ unsigned order_of(float score) {
    if (score != score) return 0xffffffffu;
    if (score == 0.0f) return 0x80000000u;
    const unsigned bits = __float_as_uint(score);
    return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(unsigned order) {
    return __uint_as_float((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

template <int Threads, typename T>
__device__ __forceinline__ T block_max(T value, T* shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(all_lanes, value, distance);
        value = other > value ? other : value;
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
#pragma unroll
    for (int warp = 1; warp < Threads / 32; ++warp) {
        value = shared[warp] > value ? shared[warp] : value;
    }
    return value;
}

constexpr int scored_shared =
    scored_tokens * int(sizeof(float)) + scored_threads / 32 * int(sizeof(unsigned long long));

// Block (stretch of the vocabulary, row): the scores after the penalties, divided by temperature,
// and the first of the highest.
template <typename T>
__global__ void __launch_bounds__(scored_threads) score_tokens(const ScoredRows<T> args) {
    GPT2FAST_SHARED(memory);
    float* scores = reinterpret_cast<float*>(memory);
    auto* exchange = reinterpret_cast<unsigned long long*>(scores + scored_tokens);
    const int64_t row = blockIdx.y;
    const int first = int(blockIdx.x) * scored_tokens;
    const int count = min(scored_tokens, args.vocab - first);
    const T* logits = args.logits + row * args.logits_stride + first;
    for (int i = threadIdx.x; i < count; i += scored_threads) scores[i] = to_float(logits[i]);
    if (args.history != nullptr) {
        const int64_t* history = args.history + row * args.history_stride;
        const int64_t step = args.history_step;
        const int length = args.history_length, size = args.no_repeat_ngram_size;
        __syncthreads();
        if (args.repetition_penalty != 1.0f) {
            for (int i = threadIdx.x; i < length; i += scored_threads) {
                const int64_t token = history[i * step] - first;
                if (token < 0 || token >= count) continue;
                const float score = to_float(logits[token]);
                // A token may be there many times; all write the same.
                atomicExch(&scores[token], score < 0.0f ? score * args.repetition_penalty
                                                        : score / args.repetition_penalty);
            }
            __syncthreads();
        }
        if (size > 0 && size <= length) {
            const int64_t* suffix = history + (length - size + 1) * step;
            for (int i = threadIdx.x; i + size <= length; i += scored_threads) {
                const int64_t* window = history + i * step;
                const int64_t token = window[(size - 1) * step] - first;
                if (token < 0 || token >= count) continue;
                int equal = 0;
                while (equal < size - 1 && window[equal * step] == suffix[equal * step]) ++equal;
                if (equal == size - 1) atomicExch(&scores[token], -INFINITY);
            }
            __syncthreads();
        }
    }
    const uint32_t* mask = nullptr;
    if (args.token_mask != nullptr) {
        mask = args.token_mask + row * args.mask_stride + first / 32;
    }
    static_assert(scored_tokens % 32 == 0, "a block's words of a mask are its own");
    unsigned long long best = 0;
    for (int i = threadIdx.x; i < count; i += scored_threads) {
        float score = scores[i];
        if (mask != nullptr && (mask[i / 32] >> (i % 32) & 1u) == 0) score = -INFINITY;
        if (args.scores != nullptr) {
            if (args.temperature != 1.0f) score /= args.temperature;
            args.scores[row * args.vocab + first + i] = score;
        }
        const unsigned long long key =
            (unsigned long long)(order_of(score)) << 32 | ~unsigned(first + i);
        best = max(best, key);
    }
    best = block_max<scored_threads>(best, exchange);
    if (threadIdx.x == 0) args.best[row * gridDim.x + blockIdx.x] = best;
}

// A warp a row: the first of the highest scores.
static __global__ void __launch_bounds__(32)
    choose_highest(const unsigned long long* best, int blocks, int64_t* out) {
    unsigned long long found = 0;
    for (int i = threadIdx.x; i < blocks; i += 32) {
        found = max(found, best[int64_t(blockIdx.x) * blocks + i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        found = max(found, __shfl_xor_sync(all_lanes, found, distance));
    }
    if (threadIdx.x == 0) out[blockIdx.x] = int64_t(~unsigned(found));
}

struct DrawnRows {
    const float* scores;             // (rows, vocab)
    const unsigned long long* best;  // (rows, blocks)
    int blocks, vocab;
    const float* uniform;
    int64_t uniform_stride;
    int64_t* out;
    int top_k;   // 0: off
    bool top_p;  // on
    float rest;  // 1 - p
    float min_p;
    float untypical;  // 1 - p
};

constexpr int draw_threads = 512;
constexpr int draw_warps = draw_threads / 32;
constexpr int draw_ranges = 2048;
constexpr int ranges_of_thread = draw_ranges / draw_threads;

using Mass = unsigned long long;

// The mass of a score: a count for top-k, its weight for top-p.
struct CountOfScores {
    __device__ __forceinline__ Mass operator()(float) const { return 1; }
};

struct WeightOfScores {
    float highest;

    __device__ __forceinline__ Mass operator()(float score) const {
        return Mass(expf(score - highest) * 0x1p40f);
    }
};

// True if all but the k highest are below.
struct MoreThanOthers {
    Mass k, total;
    __device__ __forceinline__ bool operator()(Mass mass) const { return mass + k > total; }
};

// True if the share of the total exceeds the 1 - p that top-p leaves out; all of it always does.
struct MoreThanShare {
    float rest;
    Mass total;
    __device__ __forceinline__ bool operator()(Mass mass) const {
        return mass == total || float(double(mass) / double(total)) > rest;
    }
};

// Shared memory of a draw.
struct DrawShared {
    Mass ranges[draw_ranges];
    Mass warps[draw_warps];
    Mass found_before, found_mass;
    int found;
    int ties[draw_warps];
    double sums[draw_warps];
};

// Equal-width ranges below the highest score, in ascending order; all beyond 32 are one.
__device__ __forceinline__ int range_of(float score, float highest) {
    const float distance = (highest - score) * (draw_ranges / 32.0f);
    return draw_ranges - 1 - int(fminf(distance, float(draw_ranges - 1)));
}

// The sum over all ranges.
__device__ __forceinline__ Mass total_of_ranges(DrawShared& shared) {
    Mass total = 0;
    for (int i = 0; i < ranges_of_thread; ++i) {
        total += shared.ranges[threadIdx.x * ranges_of_thread + i];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        total += __shfl_xor_sync(all_lanes, total, distance);
    }
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = total;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < draw_warps; ++warp) total += shared.warps[warp];
    return total;
}

// The sum over the block, in the same order every time.
__device__ __forceinline__ double block_sum(double value, DrawShared& shared) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(all_lanes, value, distance);
    }
    __syncthreads();  // what was summed before is read
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = 0.0;
    for (int warp = 0; warp < draw_warps; ++warp) value += shared.sums[warp];
    return value;
}

// Finds the first range up to which the mass, on top of `before`, exceeds; adds to `before` what
// lies below it. `shared.warps` is as total_of_ranges has left it.
template <typename Exceeds>
__device__ int find_range(DrawShared& shared, Mass& before, Mass& mass, Exceeds exceeds) {
    const int lane = threadIdx.x % 32;
    Mass own = 0;
    for (int i = 0; i < ranges_of_thread; ++i) {
        own += shared.ranges[threadIdx.x * ranges_of_thread + i];
    }
    Mass up_to = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const Mass lower = __shfl_up_sync(all_lanes, up_to, distance);
        if (lane >= distance) up_to += lower;
    }
    up_to += before;
    for (int warp = 0; warp < int(threadIdx.x) / 32; ++warp) up_to += shared.warps[warp];
    Mass below = up_to - own;
    if (!exceeds(below) && exceeds(up_to)) {
        int range = threadIdx.x * ranges_of_thread;
        while (!exceeds(below + shared.ranges[range])) below += shared.ranges[range++];
        shared.found = range;
        shared.found_before = below;
        shared.found_mass = shared.ranges[range];
    }
    __syncthreads();
    before = shared.found_before;
    mass = shared.found_mass;
    return shared.found;
}

// Of scores in order: the first up to which a mass exceeds.
struct Edge {
    unsigned order;
    Mass before;  // of lower scores
    Mass mass;    // of those that equal it
};

struct ScoreItself {
    __device__ __forceinline__ float operator()(float score) const { return score; }
};

// The edge among the finite keys of at least `low`; exceeds_of(total) gives the limit. Leaves the
// total in `total`; found is false, and there is no edge, where not even that exceeds.
template <typename KeyOf, typename MassOf, typename ExceedsOf>
__device__ bool find_edge(const float* scores, int vocab, unsigned low, float highest, KeyOf key_of,
                          MassOf mass_of, ExceedsOf exceeds_of, DrawShared& shared, Edge& edge,
                          Mass& total) {
    const auto sum_ranges = [&](auto range_in) {
        for (int i = threadIdx.x; i < draw_ranges; i += draw_threads) shared.ranges[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocab; i += draw_threads) {
            const float score = scores[i];
            const int range = range_in(key_of(score));
            if (range >= 0) atomicAdd(&shared.ranges[range], mass_of(score));
        }
        __syncthreads();
        return total_of_ranges(shared);
    };
    total = sum_ranges([&](float key) {
        return key == -INFINITY || order_of(key) < low ? -1 : range_of(key, highest);
    });
    const auto exceeds = exceeds_of(total);
    if (exceeds(0) || !exceeds(total)) return false;
    edge.before = 0;
    const int nearest = find_range(shared, edge.before, edge.mass, exceeds);

    // The lowest and the highest score of that range, by bisection.
    unsigned first = max(low, order_of(-largest_float)), last = order_of(highest);
    for (unsigned end = last; first < end;) {
        const unsigned middle = first + (end - first) / 2;
        if (range_of(score_of(middle), highest) >= nearest) {
            end = middle;
        } else {
            first = middle + 1;
        }
    }
    for (unsigned begin = first; begin < last;) {
        const unsigned middle = last - (last - begin) / 2;
        if (range_of(score_of(middle), highest) <= nearest) {
            begin = middle;
        } else {
            last = middle - 1;
        }
    }
    while (first < last) {
        constexpr int bits = 11;
        static_assert(1 << bits == draw_ranges, "a range for each value of so many bits");
        const int shift = max(0, 32 - __clz(int(last - first)) - bits);
        sum_ranges([&](float key) {
            const unsigned order = order_of(key);
            return order < first || order > last ? -1 : int((order - first) >> shift);
        });
        const int range = find_range(shared, edge.before, edge.mass, exceeds);
        first += unsigned(range) << shift;
        last = min(last, first + ((1u << shift) - 1));
    }
    edge.order = first;
    return true;
}

// A block a row: the first token, in the order of the vocabulary, up to which the kept weights
// exceed uniform * total. Token 0 of a row without probabilities.
template <bool typical>
__global__ void __launch_bounds__(draw_threads, typical ? 1 : 2) draw_tokens(const DrawnRows args) {
    GPT2FAST_SHARED(memory);
    DrawShared& shared = *reinterpret_cast<DrawShared*>(memory);
    const int64_t row = blockIdx.x;
    const int vocab = args.vocab, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* scores = args.scores + row * vocab;
    Mass best = 0;
    for (int i = threadIdx.x; i < args.blocks; i += draw_threads) {
        best = max(best, Mass(args.best[row * args.blocks + i]));
    }
    best = block_max<draw_threads>(best, shared.warps);
    const float highest = score_of(unsigned(best >> 32));
    if (!(highest >= -largest_float && highest <= largest_float)) {
        if (threadIdx.x == 0) args.out[row] = 0;
        return;
    }

    // Kept are the scores above the edge, and of those equal to it all but the first `dropped`.
    unsigned edge_order = order_of(-largest_float);
    int dropped = 0;
    Edge edge;
    Mass total;
    if (args.top_k > 0) {
        const Mass k = Mass(args.top_k);
        if (find_edge(
                scores, vocab, edge_order, highest, ScoreItself{}, CountOfScores{},
                [&](Mass all) { return MoreThanOthers{k, all}; }, shared, edge, total)) {
            edge_order = edge.order;
        }
    }
    if (args.top_p) {
        const WeightOfScores weight_of{highest};
        find_edge(
            scores, vocab, edge_order, highest, ScoreItself{}, weight_of,
            [&](Mass all) { return MoreThanShare{args.rest, all}; }, shared, edge, total);
        edge_order = edge.order;
        const Mass weight = weight_of(score_of(edge.order));
        const MoreThanShare exceeds{args.rest, total};
        int most = int(edge.mass / weight) - 1;
        while (dropped < most) {
            const int middle = dropped + (most - dropped) / 2;
            if (exceeds(edge.before + Mass(middle + 1) * weight)) {
                most = middle;
            } else {
                dropped = middle + 1;
            }
        }
    }

    // Typical are the scores of at most this distance from the expected one.
    float expected = 0.0f, farthest = INFINITY;
    const auto weight_of = [&](float score) {
        const float weight = expf(score - highest);
        if (typical && fabsf(score - expected) > farthest) return 0.0f;
        return weight < args.min_p ? 0.0f : weight;
    };
    if constexpr (typical) {
        double sum = 0.0, moment = 0.0;
        int ties = 0;
        for (int i = threadIdx.x; i < vocab; i += draw_threads) {
            const unsigned order = order_of(scores[i]);
            if (order > edge_order) {
                const double weight = double(weight_of(scores[i]));
                sum += weight;
                moment += weight * double(scores[i] - highest);
            } else if (order == edge_order) {
                ++ties;
            }
        }
        sum = block_sum(sum, shared);
        moment = block_sum(moment, shared);
        ties = int(block_sum(double(ties), shared));
        const float tied = score_of(edge_order);
        const double tie_weights = double(weight_of(tied)) * double(ties - dropped);
        if (tie_weights > 0.0) {
            sum += tie_weights;
            moment += tie_weights * double(tied - highest);
        }
        expected = highest + float(moment / sum);
        find_edge(
            scores, vocab, order_of(-largest_float), 0.0f,
            [&](float score) {
                const bool kept = order_of(score) >= edge_order && weight_of(score) > 0.0f;
                return kept ? -fabsf(score - expected) : -INFINITY;
            },
            [&](float score) {
                const Mass weight = WeightOfScores{highest}(score);
                const bool tie = order_of(score) == edge_order;
                return tie ? weight * Mass(ties - dropped) / Mass(ties) : weight;
            },
            [&](Mass all) { return MoreThanShare{args.untypical, all}; }, shared, edge, total);
        farthest = -score_of(edge.order);
    }
    const int stretch = (vocab + draw_threads - 1) / draw_threads * 32;
    const int begin = min(warp * stretch, vocab), end = min(begin + stretch, vocab);
    double sum = 0.0;
    int ties = 0;
    for (int i = begin + lane; i < end; i += 32) {
        const unsigned order = order_of(scores[i]);
        if (order > edge_order) {
            sum += double(weight_of(scores[i]));
        } else if (order == edge_order) {
            ++ties;
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(all_lanes, sum, distance);
        ties += __shfl_xor_sync(all_lanes, ties, distance);
    }
    if (lane == 0) {
        shared.sums[warp] = sum;
        shared.ties[warp] = ties;
    }
    __syncthreads();
    const double tie_weight = double(weight_of(score_of(edge_order)));
    // Of the warps up to this one: the sum, and how many ties come before its own.
    double sum_before = 0.0, sum_all = 0.0;
    int ties_before = 0, ties_all = 0;
    for (int i = 0; i < draw_warps; ++i) {
        if (i == warp) {
            sum_before = sum_all;
            ties_before = ties_all;
        }
        const int kept = max(0, ties_all + shared.ties[i] - max(dropped, ties_all));
        sum_all += shared.sums[i] + double(kept) * tie_weight;
        ties_all += shared.ties[i];
        if (i == warp) sum = sum_all;
    }
    const double target = double(args.uniform[row * args.uniform_stride]) * sum_all;
    if (threadIdx.x == 0 && !(sum_all > target)) args.out[row] = 0;
    // One warp goes on.
    if (sum_before > target || !(sum > target)) return;
    int token = 0;
    for (int base = begin; base < end; base += 32) {
        const int i = base + lane;
        const float score = i < end ? scores[i] : -INFINITY;
        const unsigned order = order_of(score);
        const bool tie = order == edge_order;
        const unsigned all_ties = __ballot_sync(all_lanes, tie);
        const int tie_number = ties_before + __popc(all_ties & ((1u << lane) - 1u));
        ties_before += __popc(all_ties);
        const bool kept = order > edge_order || (tie && tie_number >= dropped);
        const float weight = kept ? weight_of(score) : 0.0f;
        double up_to = double(weight);
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const double lower = __shfl_up_sync(all_lanes, up_to, distance);
            if (lane >= distance) up_to += lower;
        }
        up_to += sum_before;
        const unsigned possible = __ballot_sync(all_lanes, weight > 0.0f);
        const unsigned reached = __ballot_sync(all_lanes, weight > 0.0f && up_to > target);
        // The last one with a weight, should rounding leave the sum just below.
        if (possible != 0u) token = base + 31 - __clz(int(possible));
        if (reached != 0u) {
            token = base + __ffs(int(reached)) - 1;
            break;
        }
        sum_before = __shfl_sync(all_lanes, up_to, 31);
    }
    if (lane == 0) args.out[row] = token;
}

}  // namespace gpt2fast::kernels
