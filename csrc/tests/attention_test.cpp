// Attention over whole sequences of one instruction set, forward and backward, against double
// precision: causal or not, with keys for each head of queries or for several.
#include "testing.h"

#include "cpu/prelude.h"
#include GPT2FAST_SIMD
#include "cpu/simd/math.h"

#include "cpu/attention_backward.h"

namespace {

using namespace gpt2fast::GPT2FAST_ISA;
using gpt2fast::Attention;
using gpt2fast::AttentionBackward;
using gpt2fast::bfloat16;
using gpt2fast::Heads;
using testing::expect;
using testing::expect_close;
using testing::Random;

// A (batch, time, heads, head size) tensor of random numbers, with a gap behind each head and each
// entry; the last head ends where the memory does.
template <typename T>
struct Tensor {
    int64_t time, heads, size, head_stride, entry_stride, row_stride;
    std::vector<T> data;

    Tensor(Random& random, int64_t batch, int64_t time, int64_t heads, int64_t size)
        : time(time), heads(heads), size(size), head_stride(size + 2),
          entry_stride(heads * head_stride + 3), row_stride(time * entry_stride + 5),
          data(size_t((batch - 1) * row_stride + (time - 1) * entry_stride +
                      (heads - 1) * head_stride + size)) {
        for (T& x : data) gpt2fast::assign(x, random.normal());
    }

    Heads<const void> view() const { return {data.data(), row_stride, entry_stride, head_stride}; }

    double at(int64_t row, int64_t t, int64_t head, int64_t d) const {
        return gpt2fast::to_float(
            data[size_t(row * row_stride + t * entry_stride + head * head_stride + d)]);
    }
};

template <typename T>
std::vector<float> widened(const std::vector<T>& values) {
    std::vector<float> out;
    for (const T& x : values) out.push_back(gpt2fast::to_float(x));
    return out;
}

// Runs [0, items) of a kernel in ranges that begin and end within heads.
template <typename Kernel>
void run_in_ranges(int64_t items, Kernel kernel) {
    for (int64_t begin = 0, step = 1; begin < items; begin += step, step = step % 3 + 1) {
        kernel(begin, std::min(items, begin + step));
    }
}

template <typename T>
void sequences_are_exact(double tolerance, int64_t heads, int64_t key_heads, bool causal,
                         bool masked) {
    Random random;
    const int64_t batch = 2, group = heads / key_heads;
    const float scale = 0.3f;
    for (int64_t size : {2, 7, 24}) {
        for (int64_t time : {1, 33, 75}) {
            const Tensor<T> q(random, batch, time, heads, size);
            const Tensor<T> k(random, batch, time, key_heads, size);
            const Tensor<T> v(random, batch, time, key_heads, size);
            const Tensor<T> grad(random, batch, time, heads, size);
            std::vector<uint8_t> visible(size_t(batch * time), 1);
            for (uint8_t& each : visible) each = uint8_t(!masked || random.below(3) > 0);
            const int64_t queries = batch * time * heads;
            std::vector<double> out(size_t(queries * size)), grad_q(out.size());
            std::vector<double> grad_k(size_t(batch * time * key_heads * size));
            std::vector<double> grad_v(grad_k.size());
            std::vector<float> lse(size_t(queries), std::numeric_limits<float>::infinity());
            for (int64_t item = 0; item < queries; ++item) {
                const int64_t row = item / heads / time, t = item / heads % time;
                const int64_t head = item % heads, from = head / group;
                const auto sees = [&](int64_t s) {
                    return visible[size_t(row * time + s)] && (!causal || s <= t);
                };
                std::vector<double> weights(size_t(time), 0.0), slopes(size_t(time), 0.0);
                double total = 0, inner = 0;
                for (int64_t s = 0; s < time; ++s) {
                    double score = 0;
                    for (int64_t d = 0; d < size; ++d) {
                        score += q.at(row, t, head, d) * k.at(row, s, from, d);
                        slopes[size_t(s)] += grad.at(row, t, head, d) * v.at(row, s, from, d);
                    }
                    if (sees(s)) total += weights[size_t(s)] = std::exp(score * scale);
                }
                if (total == 0) continue;
                lse[size_t((row * heads + head) * time + t)] = float(std::log(total));
                for (int64_t s = 0; s < time; ++s) {
                    weights[size_t(s)] /= total;
                    inner += weights[size_t(s)] * slopes[size_t(s)];
                }
                for (int64_t s = 0; s < time; ++s) {
                    const double weight = weights[size_t(s)];
                    const double slope = weight * (slopes[size_t(s)] - inner) * scale;
                    for (int64_t d = 0; d < size; ++d) {
                        const size_t at = size_t(item * size + d);
                        const size_t key = size_t(((row * time + s) * key_heads + from) * size + d);
                        out[at] += weight * v.at(row, s, from, d);
                        grad_q[at] += slope * k.at(row, s, from, d);
                        grad_k[key] += slope * q.at(row, t, head, d);
                        grad_v[key] += weight * grad.at(row, t, head, d);
                    }
                }
            }

            std::vector<T> found(out.size()), found_q(out.size());
            std::vector<T> found_k(grad_k.size()), found_v(grad_v.size());
            std::vector<float> found_lse(lse.size());
            Attention args{};
            args.q = q.view();
            args.k = k.view();
            args.v = v.view();
            args.out = found.data();
            args.lse = found_lse.data();
            args.visible = masked ? visible.data() : nullptr;
            args.batch = batch;
            args.time = time;
            args.heads = heads;
            args.key_heads = key_heads;
            args.head_dim = size;
            args.scale = scale;
            args.dtype =
                std::is_same_v<T, float> ? gpt2fast::DType::float32 : gpt2fast::DType::bfloat16;
            args.causal = causal;
            const int64_t blocks = gpt2fast::ceil_div(time, gpt2fast::attention_queries);
            run_in_ranges(batch * heads * blocks,
                          [&](int64_t begin, int64_t end) { attention(args, begin, end); });
            const Heads<const void> result{found.data(), time * heads * size, heads * size, size};
            const AttentionBackward backward{args,           grad.view(),    result,
                                             found_q.data(), found_k.data(), found_v.data()};
            run_in_ranges(batch * key_heads, [&](int64_t begin, int64_t end) {
                attention_backward(backward, begin, end);
            });
            const std::string shape =
                std::to_string(time) + " entries of size " + std::to_string(size);
            expect_close(widened(found), out, tolerance, "results of " + shape);
            if (time > 1) {
                expect_close(widened(found_q), grad_q, 3 * tolerance, "gradient of q, " + shape);
                expect_close(widened(found_k), grad_k, 3 * tolerance, "gradient of k, " + shape);
            } else {  // of one weight, which is 1 whatever its score is
                for (float x : widened(found_q)) expect(std::fabs(x) < 1e-4, "gradient of q");
                for (float x : widened(found_k)) expect(std::fabs(x) < 1e-4, "gradient of k");
            }
            expect_close(widened(found_v), grad_v, 3 * tolerance, "gradient of v, " + shape);
            for (size_t i = 0; i < lse.size(); ++i) {
                expect(lse[i] == found_lse[i] || std::fabs(lse[i] - found_lse[i]) < 1e-2,
                       "logarithms of sums, " + shape);
            }
        }
    }
}

}  // namespace

bool test_attention() {
    bool fine = true;
    for (const auto& [heads, key_heads] : {std::pair{2, 2}, std::pair{4, 2}, std::pair{3, 1}}) {
        for (const bool causal : {true, false}) {
            for (const bool masked : {false, true}) {
                const std::string name = std::to_string(heads) + " heads on " +
                                         std::to_string(key_heads) + (causal ? ", causal" : "") +
                                         (masked ? ", masked" : "");
                const auto run = [&, heads = heads, key_heads = key_heads](auto* type,
                                                                           double tolerance) {
                    sequences_are_exact<std::remove_pointer_t<decltype(type)>>(
                        tolerance, heads, key_heads, causal, masked);
                };
                fine &= testing::passes((name + ", float32").c_str(),
                                        [&] { run(static_cast<float*>(nullptr), 2e-6); });
                fine &= testing::passes((name + ", bfloat16").c_str(),
                                        [&] { run(static_cast<bfloat16*>(nullptr), 8e-3); });
            }
        }
    }
    return fine;
}
