// Cases for launch/cross_entropy.h.
#include "launch/cross_entropy.h"

#include "rows.h"

namespace gpt2fast::simulated {
namespace {

constexpr int64_t ignore_index = -100;
constexpr float factor = 0.375f;
constexpr float infinity = std::numeric_limits<float>::infinity();

struct Batch {
    std::vector<double> losses, gradients;
};

template <class T>
Batch exact_batch(const Rows<T>& logits, const Buffer<int64_t>& targets, int64_t columns) {
    Batch exact;
    for (int64_t r = 0; r < targets.size(); ++r) {
        double high = -infinity, sum = 0;
        for (int64_t c = 0; c < columns; ++c) high = std::max(high, logits(r, c));
        for (int64_t c = 0; c < columns; ++c) sum += std::exp(logits(r, c) - high);
        const double lse = high + std::log(sum);
        const bool ignored = targets[r] == ignore_index;
        exact.losses.push_back(ignored ? 0.0 : lse - logits(r, targets[r]));
        for (int64_t c = 0; c < columns; ++c) {
            const double weight = std::exp(logits(r, c) - lse) - (c == targets[r] ? 1.0 : 0.0);
            exact.gradients.push_back(ignored ? 0.0 : factor * weight);
        }
    }
    return exact;
}

template <class T>
void run(Rows<T>& logits, const Buffer<int64_t>& targets, Buffer<float>& losses, int64_t columns,
         bool differentiate) {
    const Buffer<float> on_device(1, factor);
    launch::CrossEntropy args{};
    args.logits = logits.data();
    args.targets = targets.data();
    args.factor = differentiate ? on_device.data() : nullptr;
    args.losses = losses.data();
    args.rows = targets.size();
    args.columns = columns;
    args.stride = logits.stride();
    args.ignore_index = ignore_index;
    args.differentiate = differentiate;
    args.dtype = dtype_of<T>;
    launch::cross_entropy(args, nullptr);
}

template <class T>
void check(int64_t rows, int64_t columns, Layout layout, bool differentiate, float scale = 2.0f) {
    const std::string what = "cross_entropy " + name_of<T>() + " " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " gap " + std::to_string(layout.gap);
    Random random;
    Rows<T> logits(random, rows, columns, layout, scale, 1.0f);
    Buffer<int64_t> targets = random.below(columns, rows);
    targets[0] = columns - 1;
    if (rows > 1) targets[1] = 0;
    if (rows > 2) targets[2] = ignore_index;
    const Batch exact = exact_batch(logits, targets, columns);
    const Buffer<T> before = logits.packed();
    Buffer<float> losses(rows);
    run(logits, targets, losses, columns, differentiate);

    expect_each(losses, exact.losses, 8, 4.0, what + " losses");
    logits.expect_gaps_untouched(what);
    const Buffer<T> after = logits.packed();
    if (differentiate) {
        // The smallest gradients of half-precision storage are rounded to what there is.
        const bool wide = std::is_same_v<T, float>;
        expect_each(after, exact.gradients, wide ? 32 : 0.6, 0x1p-12, what + " gradients");
    } else {
        for (int64_t i = 0; i < before.size(); ++i) {
            expect_same(to_double(after[i]), to_double(before[i]),
                        what + ": logit " + std::to_string(i));
        }
    }
}

CASE("cross_entropy with gradients") {
    check<float>(3, 2500, {}, true);
    check<fp16>(1, 768, {}, true);
    check<bf16>(1, 8200, {}, true);
}

CASE("cross_entropy without gradients") {
    check<float>(1, 1028, {}, false);
    check<fp16>(1, 48, {}, false);
    check<bf16>(1, 1600, {}, false);
    check<float>(1, 33, {}, false);
    check<fp16>(1, 33, {}, false);
    check<bf16>(2, 33, {}, false);
}

// GPT-2's vocabulary is odd: a row begins aligned only where it is longer than that.
CASE("cross_entropy of odd vocabularies, padded or not") {
    check<float>(5, 33, {0, 3}, true);
    check<fp16>(2, 1601, {0, 7}, true);
    check<bf16>(3, 2049, {0, 7}, true);
    check<float>(1, 1601, {}, true);
    check<fp16>(1, 33, {}, true);
    check<bf16>(1, 2049, {}, true);
    check<bf16>(1, 17, {0, 1}, false);
    check<bf16>(1, 64, {1, 0}, true);
    check<bf16>(2, 1, {}, true);
    check<bf16>(1, 7, {0, 1}, true);
}

CASE("cross_entropy of scores far apart") {
    check<float>(1, 1600, {}, true, 60.0f);
    check<bf16>(1, 1600, {}, true, 200.0f);
}

CASE("cross_entropy of excluded tokens") {
    for (const int64_t columns : {33, 4096}) {
        Random random;
        Rows<float> logits(random, 2, columns);
        Buffer<int64_t> targets(2, 5);
        for (int64_t c = 0; c < columns; ++c) {
            if (c > 5) logits.set(0, c, -infinity);
        }
        const Batch exact = exact_batch(logits, targets, columns);
        Buffer<float> losses(2);
        run(logits, targets, losses, columns, true);
        expect_each(losses, exact.losses, 8, 1.0, "losses");
        expect_each(logits.packed(), exact.gradients, 32, 0x1p-12, "gradients");
    }
}

CASE("cross_entropy of what is not a number") {
    for (const int64_t columns : {10, 2048}) {
        Random random;
        Rows<float> logits(random, 2, columns);
        Buffer<int64_t> targets(2, columns - 1);
        logits.set(0, 0, std::nanf(""));
        Buffer<float> losses(2);
        run(logits, targets, losses, columns, true);
        expect(std::isnan(losses[0]), "the loss is a number: " + written(losses[0]));
        expect(std::isnan(logits(0, columns - 1)),
               "the gradient is a number: " + written(logits(0, columns - 1)));
        expect(!std::isnan(losses[1]), "the other row's loss is " + written(losses[1]));
    }
}

CASE("cross_entropy refuses targets outside of the vocabulary") {
    for (const int64_t outside : {-1, 40}) {
        Random random;
        Rows<bf16> logits(random, 2, 40);
        Buffer<int64_t> targets(2, 1);
        targets[1] = outside;
        Buffer<float> losses(2);
        expect_error("__trap", [&] { run(logits, targets, losses, 40, true); });
    }
}

}  // namespace
}  // namespace gpt2fast::simulated
