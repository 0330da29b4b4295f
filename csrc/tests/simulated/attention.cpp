// Attention, forward and backward.
#include "launch/attention.h"

#include <algorithm>

#include "testing.h"

namespace gpt2fast::simulated {
namespace {

template <class T>
constexpr DType dtype_of = DType::float32;
template <>
constexpr DType dtype_of<bf16> = DType::bfloat16;
template <>
constexpr DType dtype_of<fp16> = DType::float16;

struct Shape {
    int64_t batch, time, heads, head_dim;
    double dropout_p = 0.0;
    bool masked = false, deterministic = false;
    double scale = 0.2;
    int64_t hidden = 70;  // keys that nobody sees, with a mask
    bool causal = true;
    int64_t group = 1;  // heads of queries that share a head of keys

    int64_t key_heads() const { return heads / group; }
    // Keys before this one are visible from query t, if no mask hides them.
    int64_t end(int64_t t) const { return causal ? t + 1 : time; }
};

// The same without causality, or with one head of keys for `group` heads of queries, or both.
Shape formed(Shape shape, bool causal, int64_t group) {
    shape.causal = causal;
    shape.group = group;
    return shape;
}

// Philox4x32-10, as the paper has it.
std::vector<uint32_t> philox(uint64_t key, std::vector<uint32_t> counter) {
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t x = 0xD2511F53ull * counter[0], y = 0xCD9E8D57ull * counter[2];
        counter = {uint32_t(y >> 32) ^ counter[1] ^ low, uint32_t(y),
                   uint32_t(x >> 32) ^ counter[3] ^ high, uint32_t(x)};
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return counter;
}

// The factor of the weight of a query and a key after dropout.
double kept(const Shape& shape, int64_t seed, int64_t head, int64_t query, int64_t key) {
    const auto threshold = uint32_t(std::lround(shape.dropout_p * 65536));
    if (threshold == 0) return 1.0;
    const auto words = philox(uint64_t(seed), {uint32_t(key / 32 * 4 + key % 8 / 2),
                                               uint32_t(query), uint32_t(head), 0u});
    const uint32_t bits = words[size_t(key / 8 % 4)] >> (key % 2 * 16) & 0xFFFFu;
    return bits < threshold ? 0.0 : 65536.0 / (65536.0 - threshold);
}

// q, k, v are views of one packed (batch, time, heads + 2 * key_heads, head_dim) tensor; all else
// is contiguous.
template <class T>
class Attention {
public:
    explicit Attention(const Shape& shape)
        : shape_(shape), elements_(shape.batch * shape.time * shape.heads * shape.head_dim),
          key_elements_(elements_ / shape.group), rows_(shape.batch * shape.heads * shape.time),
          packed_(random_.normal<T>(elements_ + 2 * key_elements_)),
          grad_(random_.normal<T>(elements_)), out_(elements_), grad_q_(elements_),
          grad_k_(key_elements_), grad_v_(key_elements_), lse_(rows_),
          visible_(shape.batch * shape.time, uint8_t(1)), seed_(1, int64_t(0x123456789ABCDEF)) {
        for (int64_t i = 0; shape.masked && i < visible_.size(); ++i) {
            // The first row begins with keys that nobody sees.
            visible_[i] =
                i >= std::min<int64_t>(shape.time - 1, shape.hidden) && random_.below(3) > 0;
        }
    }

    void run() {
        const launch::Attention args = arguments();
        launch::attention_forward({args, view(out_), lse_.data()}, nullptr);
        Buffer<float> workspace(launch::attention_backward_floats(args, shape_.deterministic));
        launch::attention_backward(
            {args, view(grad_), view(out_), lse_.data(), view(grad_q_), view_of_keys(grad_k_),
             view_of_keys(grad_v_), workspace.data(), shape_.deterministic},
            nullptr);
    }

    void check() {
        std::vector<double> out(size_t(elements_), 0.0), grad_q = out;
        std::vector<double> grad_k(size_t(key_elements_), 0.0), grad_v = grad_k;
        for (int64_t b = 0; b < shape_.batch; ++b) {
            for (int64_t h = 0; h < shape_.heads; ++h) {
                for (int64_t t = 0; t < shape_.time; ++t) {
                    attend(b, h, t, out, grad_q, grad_k, grad_v);
                }
            }
        }
        // In float32 what counts is the scores' rounding, which is relative to their size.
        const double multiple = std::is_same_v<T, float> ? 10 : 1.5;
        expect_close(out_, out, multiple, "out");
        expect_close(grad_q_, grad_q, 2 * multiple, "gradient of q");
        expect_close(grad_k_, grad_k, 2 * multiple, "gradient of k");
        expect_close(grad_v_, grad_v, 2 * multiple, "gradient of v");
    }

    launch::Attention arguments() {
        const auto part = [&](int64_t i) {
            const int64_t width = packed_heads() * shape_.head_dim;
            return Heads<void>{packed_.data() + first_head(i) * shape_.head_dim,
                               width * shape_.time, width, shape_.head_dim};
        };
        return {part(0),
                part(1),
                part(2),
                shape_.batch,
                shape_.time,
                shape_.heads,
                shape_.key_heads(),
                shape_.head_dim,
                shape_.causal,
                shape_.scale,
                shape_.masked ? visible_.data() : nullptr,
                shape_.dropout_p,
                shape_.dropout_p > 0 ? seed_.data() : nullptr,
                dtype_of<T>};
    }

private:
    Heads<void> view(Buffer<T>& x) { return contiguous(x, shape_.heads); }
    Heads<void> view_of_keys(Buffer<T>& x) { return contiguous(x, shape_.key_heads()); }
    Heads<void> contiguous(Buffer<T>& x, int64_t heads) {
        const int64_t width = heads * shape_.head_dim;
        return {x.data(), width * shape_.time, width, shape_.head_dim};
    }

    int64_t at(int64_t b, int64_t t, int64_t h) const {
        return ((b * shape_.time + t) * shape_.heads + h) * shape_.head_dim;
    }
    // Of the keys and values that query head h reads.
    int64_t key_at(int64_t b, int64_t s, int64_t h) const {
        return ((b * shape_.time + s) * shape_.key_heads() + h / shape_.group) * shape_.head_dim;
    }

    int64_t packed_heads() const { return shape_.heads + 2 * shape_.key_heads(); }
    // Of a part of the packed tensor: 0 queries, 1 keys, 2 values.
    int64_t first_head(int64_t part) const {
        return part == 0 ? 0 : shape_.heads + (part - 1) * shape_.key_heads();
    }
    // Of query head h, or of the keys or values that it reads.
    double packed(int64_t part, int64_t b, int64_t t, int64_t h, int64_t d) const {
        const int64_t head = first_head(part) + (part == 0 ? h : h / shape_.group);
        const int64_t row = (b * shape_.time + t) * packed_heads() + head;
        return to_double(packed_[row * shape_.head_dim + d]);
    }

    void attend(int64_t b, int64_t h, int64_t t, std::vector<double>& out,
                std::vector<double>& grad_q, std::vector<double>& grad_k,
                std::vector<double>& grad_v) {
        const int64_t end = shape_.end(t);
        std::vector<double> weights(size_t(end), 0.0), grad_weights = weights;
        double sum = 0.0, inner = 0.0;
        for (int64_t s = 0; s < end; ++s) {
            double score = 0.0;
            for (int64_t d = 0; d < shape_.head_dim; ++d) {
                score += packed(0, b, t, h, d) * packed(1, b, s, h, d);
            }
            const bool seen = !shape_.masked || visible_[b * shape_.time + s] != 0;
            sum += weights[size_t(s)] = seen ? std::exp(score * shape_.scale) : 0.0;
        }
        const int64_t row = b * shape_.heads + h;
        const double lse = lse_[row * shape_.time + t];
        const std::string what = "log-sum of row " + std::to_string(b) + ", head " +
                                 std::to_string(h) + ", query " + std::to_string(t);
        if (sum == 0.0) return expect_same(lse, INFINITY, what);
        expect_near(lse, std::log(sum), 1e-5, what);
        for (int64_t s = 0; s < end; ++s) {
            weights[size_t(s)] /= sum;
            const double factor = kept(shape_, seed_[0], row, t, s);
            for (int64_t d = 0; d < shape_.head_dim; ++d) {
                const double grad = to_double(grad_[at(b, t, h) + d]);
                out[size_t(at(b, t, h) + d)] += weights[size_t(s)] * factor * packed(2, b, s, h, d);
                grad_v[size_t(key_at(b, s, h) + d)] += weights[size_t(s)] * factor * grad;
                grad_weights[size_t(s)] += factor * grad * packed(2, b, s, h, d);
            }
            inner += weights[size_t(s)] * grad_weights[size_t(s)];
        }
        for (int64_t s = 0; s < end; ++s) {
            const double grad =
                weights[size_t(s)] * (grad_weights[size_t(s)] - inner) * shape_.scale;
            for (int64_t d = 0; d < shape_.head_dim; ++d) {
                grad_q[size_t(at(b, t, h) + d)] += grad * packed(1, b, s, h, d);
                grad_k[size_t(key_at(b, s, h) + d)] += grad * packed(0, b, t, h, d);
            }
        }
    }

    Shape shape_;
    int64_t elements_, key_elements_, rows_;
    Random random_;
    Buffer<T> packed_, grad_, out_, grad_q_, grad_k_, grad_v_;
    Buffer<float> lse_;
    Buffer<uint8_t> visible_;
    Buffer<int64_t> seed_;
};

template <class T>
void run(const Shape& shape) {
    Attention<T> attention(shape);
    attention.run();
    attention.check();
}

}  // namespace

CASE("attention bf16 D=64") { run<bf16>({1, 150, 1, 64}); }
CASE("attention bf16 D=64 masked, dropout") { run<bf16>({2, 145, 1, 64, 0.3, true}); }
CASE("attention bf16 D=64 deterministic") { run<bf16>({1, 150, 1, 64, 0.0, false, true}); }
CASE("attention bf16 D=64 masked, dropout, deterministic") {
    run<bf16>({1, 145, 1, 64, 0.6, true, true});
}
CASE("attention of several rows and heads, masked, dropout, deterministic") {
    run<bf16>({2, 65, 3, 32, 0.3, true, true});
    run<fp16>({3, 33, 2, 40, 0.0, true, true, -0.3});
}
CASE("attention fp16 D=32 T=17, a negative scale") {
    run<fp16>({2, 17, 3, 32, 0.0, false, false, -0.3});
}
CASE("attention fp16 D=40 T=1") { run<fp16>({1, 1, 2, 40}); }
CASE("attention bf16 D=96 masked") { run<bf16>({1, 132, 1, 96, 0.0, true}); }
CASE("attention bf16 D=64, tiles of queries that see no key") {
    run<bf16>({1, 150, 1, 64, 0.0, true, false, 0.2, 140});
    run<bf16>({1, 150, 1, 64, 0.0, true, true, 0.2, 140});
}
CASE("attention bf16 D=128 dropout") { run<bf16>({1, 132, 1, 128, 0.2}); }
CASE("attention bf16 D=120 masked, dropout, deterministic") {
    run<bf16>({1, 100, 1, 120, 0.2, true, true});
}
CASE("attention fp32 D=64 masked, dropout") { run<float>({2, 77, 1, 64, 0.3, true}); }
CASE("attention fp32 D=7") { run<float>({1, 65, 2, 7}); }
CASE("attention fp32 D=128 dropout") { run<float>({1, 70, 1, 128, 0.1}); }
CASE("attention of every head size and dtype") {
    for (const int64_t head_dim : {32, 64, 96, 128}) {
        for (const double dropout_p : {0.0, 0.25}) {
            for (const bool deterministic : {false, true}) {
                const Shape shape{2, 5, 2, head_dim, dropout_p, false, deterministic};
                run<bf16>(shape);
                run<fp16>(shape);
                if (!deterministic) run<float>(shape);
            }
        }
    }
}
// A length that fills no tile, so that there are keys past the end which nobody may see.
CASE("attention bf16 D=64, not causal") { run<bf16>(formed({1, 150, 1, 64}, false, 1)); }
CASE("attention bf16 D=64, not causal, masked, dropout, deterministic") {
    run<bf16>(formed({2, 81, 1, 64, 0.3, true, true}, false, 1));
}
CASE("attention bf16 D=64, not causal, shared keys, masked, dropout") {
    run<bf16>(formed({1, 145, 2, 64, 0.3, true}, false, 2));
}
CASE("attention bf16 D=64, shared keys") { run<bf16>(formed({1, 150, 2, 64}, true, 2)); }
CASE("attention fp16, shared keys, masked, dropout, deterministic") {
    run<fp16>(formed({2, 65, 4, 32, 0.3, true, true}, true, 2));
    run<fp16>(formed({2, 33, 3, 40, 0.0, true, true, -0.3}, false, 3));
}
CASE("attention, not causal, tiles of keys that nobody sees") {
    run<bf16>(formed({1, 150, 2, 64, 0.0, true, false, 0.2, 140}, false, 2));
    run<float>(formed({1, 150, 2, 64, 0.0, true, false, 0.2, 140}, false, 2));
}
CASE("attention fp32, not causal") {
    run<float>(formed({1, 77, 1, 64}, false, 1));
    run<float>(formed({2, 65, 1, 32, 0.3, true}, false, 1));
}
CASE("attention fp32, shared keys") {
    run<float>(formed({2, 65, 4, 7, 0.2}, true, 2));
    run<float>(formed({2, 45, 3, 128, 0.3, true}, false, 3));
}
CASE("attention of every form, head size and dtype") {
    for (const int64_t head_dim : {32, 64, 96, 128}) {
        for (const int64_t group : {1, 2, 4}) {
            for (const bool causal : {false, true}) {
                if (causal && group == 1) continue;
                for (const bool deterministic : {false, true}) {
                    const bool masked = group == 2;
                    const double dropout_p = group == 4 ? 0.25 : 0.0;
                    Shape shape{1, 9, 4, head_dim, dropout_p, masked, deterministic, 0.2, 2};
                    shape = formed(shape, causal, group);
                    run<bf16>(shape);
                    run<fp16>(shape);
                    if (!deterministic) run<float>(shape);
                }
            }
        }
    }
}
CASE("attention refuses what it cannot read") {
    Attention<bf16> unaligned({1, 4, 1, 32});
    launch::Attention args = unaligned.arguments();
    args.q.data = static_cast<bf16*>(args.q.data) + 1;
    expect_error("multiples of 16 bytes",
                 [&] { launch::attention_forward({args, args.q, nullptr}, nullptr); });
    args = Attention<float>({1, 2, 3, 8}).arguments();
    args.key_heads = 2;
    expect_error("as many heads of queries for each head of keys",
                 [&] { launch::attention_forward({args, args.q, nullptr}, nullptr); });
    expect_error("128 at most", [] { Attention<float>({1, 2, 1, 136}).run(); });
    expect_error("multiples of 8", [] { Attention<fp16>({1, 2, 1, 12}).run(); });
}

}  // namespace gpt2fast::simulated
