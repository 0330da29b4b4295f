// Cases for launch/sampling.h.
#include "launch/sampling.h"

#include <algorithm>
#include <numeric>

#include "heads.h"

namespace gpt2fast::simulated {
namespace {

constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

using Scores = std::vector<double>;
using History = std::vector<int64_t>;

void penalize(Scores& scores, const History& history, const SamplingOptions& choice) {
    const Scores given = scores;
    for (const int64_t token : history) {
        if (token < 0) continue;
        const double score = given[size_t(token)];
        scores[size_t(token)] =
            score < 0 ? score * choice.repetition_penalty : score / choice.repetition_penalty;
    }
    const size_t size = size_t(choice.no_repeat_ngram_size);
    if (size == 0 || size > history.size()) return;
    for (size_t i = 0; i + size <= history.size(); ++i) {
        const int64_t last = history[i + size - 1];
        const bool repeats =
            std::equal(history.begin() + long(i), history.begin() + long(i + size - 1),
                       history.end() - long(size - 1));
        if (repeats && last >= 0) scores[size_t(last)] = minus_infinity;
    }
}

Scores weights_of(const Scores& scores) {
    const double highest = *std::max_element(scores.begin(), scores.end());
    Scores weights;
    for (const double score : scores) weights.push_back(std::exp(score - highest));
    return weights;
}

void keep_top_k(Scores& scores, int64_t k) {
    Scores sorted = scores;
    std::sort(sorted.rbegin(), sorted.rend());
    const double edge = sorted[size_t(std::min<int64_t>(k, int64_t(sorted.size()))) - 1];
    for (double& score : scores) {
        if (score < edge) score = minus_infinity;
    }
}

void keep_top_p(Scores& scores, double p) {
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), size_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return scores[a] < scores[b]; });
    const Scores weights = weights_of(scores);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double mass = 0;
    for (size_t i = 0; i + 1 < order.size(); ++i) {
        mass += weights[order[i]];
        if (mass / total > 1 - p) break;
        scores[order[i]] = minus_infinity;
    }
}

// The weights of what is kept, none where the distance from the expected score is beyond the limit.
void keep_typical_p(const Scores& scores, Scores& weights, double p) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double expected = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
        if (weights[i] > 0) expected += weights[i] / total * scores[i];
    }
    std::vector<size_t> order(scores.size());
    std::iota(order.begin(), order.end(), size_t(0));
    const auto distance = [&](size_t i) { return std::abs(scores[i] - expected); };
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return distance(a) < distance(b); });
    double mass = 0, farthest = 0;
    for (const size_t i : order) {
        if (weights[i] == 0) continue;
        mass += weights[i];
        farthest = distance(i);
        if (mass / total >= p) break;
    }
    for (size_t i = 0; i < scores.size(); ++i) {
        if (distance(i) > farthest) weights[i] = 0;
    }
}

// The token, and how far the random number is from where another would be drawn.
struct Drawn {
    int64_t token;
    double margin;
};

Drawn draw(Scores scores, const History& history, const SamplingOptions& choice, double uniform) {
    penalize(scores, history, choice);
    for (double& score : scores) score /= choice.temperature;
    if (choice.top_k > 0) keep_top_k(scores, choice.top_k);
    if (choice.top_p < 1) keep_top_p(scores, choice.top_p);
    Scores weights = weights_of(scores);
    for (double& weight : weights) {
        if (weight < choice.min_p) weight = 0;
    }
    if (choice.typical_p < 1) keep_typical_p(scores, weights, choice.typical_p);
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double mass = 0;
    for (size_t token = 0; token < weights.size(); ++token) {
        const double before = mass / total;
        mass += weights[token];
        if (weights[token] > 0 && mass / total > uniform) {
            const double below = before == 0 ? 1 : uniform - before;
            return {int64_t(token), std::min(below, mass / total - uniform)};
        }
    }
    return {0, 1};
}

template <class T>
Buffer<int64_t> sample(const Rows<T>& logits, int64_t rows, int64_t vocab,
                       const Buffer<int64_t>& history, int64_t length, const Buffer<float>* uniform,
                       const SamplingOptions& choice,
                       const Buffer<uint32_t>* token_mask = nullptr) {
    Buffer<int64_t> out(rows);
    Buffer<float> scores(uniform == nullptr ? 0 : rows * vocab);
    Buffer<uint64_t> best(rows * launch::sample_blocks(vocab));
    launch::Sample args{};
    args.logits = logits.data();
    args.logits_stride = logits.stride();
    args.history = history.data();
    args.history_stride = length;
    args.history_step = 1;
    args.history_length = length;
    args.uniform = uniform == nullptr ? nullptr : uniform->data();
    args.uniform_stride = 1;
    args.token_mask = token_mask == nullptr ? nullptr : token_mask->data();
    args.mask_stride = (vocab + 31) / 32;
    args.out = out.data();
    args.rows = rows;
    args.vocab = vocab;
    args.dtype = dtype_of<T>;
    static_cast<SamplingOptions&>(args) = choice;
    args.scores = scores.data();
    args.best = best.data();
    launch::sample(args, nullptr);
    return out;
}

Scores row_of(const Rows<float>& logits, int64_t row, int64_t vocab) {
    Scores scores;
    for (int64_t i = 0; i < vocab; ++i) scores.push_back(logits(row, i));
    return scores;
}

// Logits are multiples of `grain`, so that several are equal.
void check_draws(int64_t rows, int64_t vocab, float scale, float grain,
                 const SamplingOptions& choice) {
    Random random;
    Rows<float> logits(random, rows, vocab, {1, 3}, scale);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < vocab && grain > 0; ++i) {
            logits.set(row, i, grain * std::round(float(logits(row, i)) / grain));
        }
    }
    constexpr int64_t length = 19;
    Buffer<int64_t> history = random.below(std::min<int64_t>(5, vocab), rows * length);
    history[0] = -1;
    Buffer<float> uniform(rows);
    for (int64_t row = 0; row < rows; ++row) uniform[row] = float(random.below(1 << 24)) * 0x1p-24f;
    uniform[0] = 0.0f;
    const Buffer<int64_t> tokens = sample(logits, rows, vocab, history, length, &uniform, choice);
    for (int64_t row = 0; row < rows; ++row) {
        const History past(history.data() + row * length, history.data() + (row + 1) * length);
        const Drawn exact = draw(row_of(logits, row, vocab), past, choice, uniform[row]);
        expect(tokens[row] == exact.token || exact.margin < 1e-5,
               "row " + std::to_string(row) + " drew " + std::to_string(tokens[row]) + ", not " +
                   std::to_string(exact.token) + ", whose distance from a threshold is " +
                   written(exact.margin));
    }
}

CASE("sample without limits") {
    check_draws(3, 700, 3.0f, 0.0f, {});
    check_draws(2, 1, 3.0f, 0.0f, {});
    check_draws(1, 2500, 12.0f, 0.0f, {0.7});
}

CASE("sample top_k") {
    check_draws(2, 90, 3.0f, 0.0f, {1.0, 1});
    check_draws(2, 700, 3.0f, 0.5f, {1.0, 50});
    check_draws(2, 40, 3.0f, 0.0f, {1.0, 40});
    check_draws(2, 200, 0.02f, 0.0f, {0.8, 120});
}

CASE("sample top_p") {
    check_draws(2, 700, 3.0f, 0.0f, {1.0, 0, 0.9});
    check_draws(2, 300, 3.0f, 1.0f, {1.0, 0, 0.5});
    check_draws(2, 90, 0.0f, 1.0f, {1.0, 0, 0.33});
    check_draws(2, 90, 3.0f, 0.0f, {1.0, 0, 0.0});
}

CASE("sample typical_p") {
    check_draws(2, 700, 3.0f, 0.0f, {1.0, 0, 1.0, 0.0, 0.9});
    check_draws(2, 300, 3.0f, 0.0f, {0.8, 40, 1.0, 0.0, 0.2});
    check_draws(2, 90, 0.0f, 1.0f, {1.0, 0, 0.33, 0.0, 0.5});
}

CASE("sample with everything") {
    check_draws(2, 700, 3.0f, 0.0f, {1.4, 80, 0.93, 0.02, 0.8, 1.3, 2});
    check_draws(2, 300, 3.0f, 1.0f, {0.6, 40, 0.95, 0.1, 1.0, 0.8, 1});
}

CASE("sample the highest score") {
    constexpr int64_t rows = 4, vocab = 2100, length = 7;
    Random random;
    Rows<bf16> logits(random, rows, vocab, {0, 5});
    for (const int64_t token : {2099, 2050, 30}) logits.set(0, token, 9.0f);
    for (int64_t i = 0; i < vocab; ++i) logits.set(1, i, float(minus_infinity));
    logits.set(2, 2048, NAN);
    logits.set(2, 70, INFINITY);
    for (int64_t i = 0; i < vocab; ++i) logits.set(3, i, i == 4 ? 2.0f : i == 9 ? 1.5f : -1.0f);
    const Buffer<int64_t> none(0);
    const SamplingOptions penalties{1.0, 0, 1.0, 0.0, 1.0, 1.5, 0};
    const Buffer<int64_t> history = integers({-1, -1, 4, 2, 4, 4, 2});
    Buffer<int64_t> repeated(rows * length);
    for (int64_t i = 0; i < repeated.size(); ++i) repeated[i] = history[i % length];
    expect_equal(sample(logits, rows, vocab, none, 0, nullptr, {}), {30, 0, 2048, 4}, "greedy");
    expect_equal(sample(logits, rows, vocab, repeated, length, nullptr, penalties),
                 {30, 0, 2048, 9}, "with a penalty");
    // The newest token has just been repeated: a third one would be the same pair again.
    const Buffer<int64_t> pair = integers({1, 2, 3, 9, 8, 4, 4});
    for (int64_t i = 0; i < repeated.size(); ++i) repeated[i] = pair[i % length];
    expect_equal(
        sample(logits, rows, vocab, repeated, length, nullptr, {1.0, 0, 1.0, 0.0, 1.0, 1.0, 2}),
        {30, 0, 2048, 9}, "without repeated pairs");
}

// The last row has no more words than it needs: a sanitizer sees what reads beyond them.
CASE("sample what a mask allows") {
    constexpr int64_t rows = 3, length = 5;
    Random random;
    for (const int64_t vocab : {1, 31, 32, 33, 64, 2047, 2049, 2500}) {
        const int64_t words = (vocab + 31) / 32;
        Rows<float> logits(random, rows, vocab, {1, 3}, 3.0f);
        Rows<float> masked(random, rows, vocab);
        Buffer<uint32_t> mask(rows * words);
        for (int64_t i = 0; i < mask.size(); ++i) mask[i] = uint32_t(random.below(1 << 30)) << 2;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t token = row * (vocab - 1) / 2;
            mask[row * words + token / 32] |= uint32_t(1) << token % 32;
            for (int64_t i = 0; i < vocab; ++i) {
                const bool allowed = (mask[row * words + i / 32] >> (i % 32) & 1) != 0;
                masked.set(row, i, allowed ? float(logits(row, i)) : float(minus_infinity));
            }
        }
        const Buffer<int64_t> history = random.below(std::min<int64_t>(5, vocab), rows * length);
        Buffer<float> uniform(rows);
        for (int64_t row = 0; row < rows; ++row) uniform[row] = 0.3f * float(row);
        const SamplingOptions penalties{0.8, 0, 1.0, 0.0, 1.0, 1.3, 0};
        for (const SamplingOptions& choice : {SamplingOptions{}, penalties}) {
            for (const bool draws : {false, true}) {
                const Buffer<float>* numbers = draws ? &uniform : nullptr;
                const auto found =
                    sample(logits, rows, vocab, history, length, numbers, choice, &mask);
                const auto expected = sample(masked, rows, vocab, history, length, numbers, choice);
                for (int64_t row = 0; row < rows; ++row) {
                    expect(found[row] == expected[row], "of " + std::to_string(vocab) + " row " +
                                                            std::to_string(row) + " chose " +
                                                            std::to_string(found[row]) + ", not " +
                                                            std::to_string(expected[row]));
                }
            }
        }
    }
}

CASE("sample from every dtype") {
    Random random;
    Rows<fp16> logits(random, 2, 300);
    for (const int64_t token : {7, 255}) logits.set(token == 255, token, 12.0f);
    const Buffer<int64_t> none(0);
    expect_equal(sample(logits, 2, 300, none, 0, nullptr, {}), {7, 255}, "float16");
}

CASE("sample a row without probabilities") {
    Random random;
    Rows<float> logits(random, 3, 300);
    logits.set(0, 200, NAN);
    logits.set(1, 10, INFINITY);
    for (int64_t i = 0; i < 300; ++i) logits.set(2, i, float(minus_infinity));
    const Buffer<int64_t> none(0);
    const Buffer<float> uniform(3, 0.5f);
    const SamplingOptions choice{1.0, 3, 0.9, 0.1};
    expect_equal(sample(logits, 3, 300, none, 0, &uniform, choice), {0, 0, 0}, "token 0");
}

}  // namespace
}  // namespace gpt2fast::simulated
