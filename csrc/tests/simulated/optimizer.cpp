// Cases for launch/optimizer.h.
#include "launch/optimizer.h"

#include <array>
#include <memory>

#include "rows.h"

namespace gpt2fast::simulated {
namespace {

// Of parameter, gradient, the two moments and master from aligned memory, in elements.
using Offsets = std::array<int64_t, 5>;

template <class P, class M>
struct Tensor {
    Rows<P> param, grad;
    Rows<M> exp_avg, exp_avg_sq;
    Rows<float> master;
    int64_t size;

    Tensor(Random& random, int64_t size, const Offsets& offsets)
        : param(random, 1, size, {offsets[0], 0}),
          grad(random, 1, size, {offsets[1], 0}, 0.5f, 0.1f),
          exp_avg(random, 1, size, {offsets[2], 0}), exp_avg_sq(random, 1, size, {offsets[3], 0}),
          master(random, 1, size, {offsets[4], 0}), size(size) {
        for (int64_t i = 0; i < size; ++i) {
            exp_avg_sq.set(0, i, 0.25f + float(std::abs(exp_avg_sq(0, i))));
        }
    }
};

struct Exact {
    std::vector<double> params, exp_avgs, exp_avg_sqs;
};

constexpr double lr = 0.01, beta1 = 0.9, beta2 = 0.95, eps = 1e-3, weight_decay = 0.1;
constexpr int64_t step = 3;

template <class P, class M>
Exact exact_step(const Tensor<P, M>& tensor, bool masters) {
    Exact exact;
    for (int64_t i = 0; i < tensor.size; ++i) {
        const double grad = tensor.grad(0, i);
        const double param = masters ? tensor.master(0, i) : tensor.param(0, i);
        const double m = beta1 * tensor.exp_avg(0, i) + (1 - beta1) * grad;
        const double v = beta2 * tensor.exp_avg_sq(0, i) + (1 - beta2) * grad * grad;
        const double spread = std::sqrt(v / (1 - std::pow(beta2, step))) + eps;
        exact.params.push_back(param * (1 - lr * weight_decay) -
                               lr / (1 - std::pow(beta1, step)) * m / spread);
        exact.exp_avgs.push_back(m);
        exact.exp_avg_sqs.push_back(v);
    }
    return exact;
}

struct Place {
    int64_t size;
    Offsets offsets = {};
};

template <class P, class M>
void check(const std::vector<Place>& places, bool masters) {
    Random random;
    std::vector<std::unique_ptr<Tensor<P, M>>> tensors;
    std::vector<Exact> exact;
    launch::AdamW args{{}, step, lr, beta1, beta2, eps, weight_decay, dtype_of<P>, dtype_of<M>};
    for (const Place& each : places) {
        tensors.push_back(std::make_unique<Tensor<P, M>>(random, each.size, each.offsets));
        Tensor<P, M>& tensor = *tensors.back();
        exact.push_back(exact_step(tensor, masters));
        args.tensors.push_back({tensor.param.data(), tensor.grad.data(), tensor.exp_avg.data(),
                                tensor.exp_avg_sq.data(), masters ? tensor.master.data() : nullptr,
                                each.size});
    }
    launch::adamw(args, nullptr);

    const double of_params = std::is_same_v<P, float> ? 8 : 0.55;
    const double of_moments = std::is_same_v<M, float> ? 8 : 0.55;
    for (size_t t = 0; t < tensors.size(); ++t) {
        const std::string what = "adamw " + name_of<P>() + " " + name_of<M>() + " tensor " +
                                 std::to_string(t) + " of " + std::to_string(tensors[t]->size) +
                                 " ";
        const double scale = 0x1p-4;
        expect_each(tensors[t]->param.packed(), exact[t].params, of_params, scale, what + "param");
        expect_each(tensors[t]->exp_avg.packed(), exact[t].exp_avgs, of_moments, scale,
                    what + "exp_avg");
        expect_each(tensors[t]->exp_avg_sq.packed(), exact[t].exp_avg_sqs, of_moments, scale,
                    what + "exp_avg_sq");
        if (masters) {
            expect_each(tensors[t]->master.packed(), exact[t].params, 8, scale, what + "master");
        }
    }
}

// Less than a thread's vector, a block's part with and without a rest, several parts.
const std::vector<Place> sizes = {{1}, {7}, {33}, {768}, {8191}, {8192}, {8193}, {20000}};

CASE("adamw of one storage") {
    check<float, float>(sizes, false);
    check<fp16, fp16>(sizes, false);
    check<bf16, bf16>(sizes, false);
}

CASE("adamw with float32 masters and moments") {
    check<fp16, float>({{7}, {2049}, {8200}}, true);
    check<bf16, float>(sizes, true);
    check<bf16, bf16>({{7}, {2049}}, true);
    check<bf16, float>({{7}, {2049}}, false);
}

CASE("adamw of unaligned tensors") {
    check<float, float>({{100, {1}}, {64}, {100, {0, 1}}, {100, {0, 0, 1}}}, false);
    check<float, float>({{100, {0, 0, 0, 1}}, {8195, {2, 2, 2, 2}}}, false);
    check<bf16, bf16>({{100, {1, 1, 1, 1}}, {64}, {9, {7, 0, 3, 0}}}, false);
    check<bf16, float>({{100, {0, 0, 0, 0, 1}}, {64}, {100, {1}}}, true);
    check<fp16, fp16>({{100, {1, 1, 1, 1}}, {64}, {9, {7}}}, false);
    check<fp16, float>({{100, {0, 0, 0, 0, 3}}, {64}}, true);
}

CASE("adamw of no elements") {
    check<float, float>({}, false);
    check<bf16, float>({{5}, {100, {1}}}, true);
    launch::AdamW args{{}, 1, lr, beta1, beta2, eps, weight_decay, DType::float32, DType::float32};
    args.tensors.push_back({nullptr, nullptr, nullptr, nullptr, nullptr, 0});
    launch::adamw(args, nullptr);
}

// More than the table of a launch holds, aligned and not in turns, empty ones between.
CASE("adamw of many tensors") {
    std::vector<Place> many;
    for (int64_t i = 0; i < 110; ++i) many.push_back({1 + i % 37, {i % 5 == 3 ? 1 : 0}});
    check<float, float>(many, false);
    std::vector<Place> aligned(49, Place{24});
    check<bf16, float>(aligned, true);
    aligned.push_back({300});
    check<bf16, bf16>(aligned, false);
}

CASE("adamw refuses moments of another storage") {
    launch::AdamW args{{}, 1, lr, beta1, beta2, eps, weight_decay, DType::float32, DType::bfloat16};
    expect_error("moments", [&] { launch::adamw(args, nullptr); });
}

}  // namespace
}  // namespace gpt2fast::simulated
