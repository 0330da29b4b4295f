// Cases for launch/decode.h.
#include "launch/decode.h"

#include <algorithm>
#include <memory>

#include "heads.h"

namespace gpt2fast::simulated {
namespace {

using Matrix = std::vector<std::vector<double>>;  // a vector for each row

template <class T>
struct Layer {
    Rows<T> ln_1_weight, ln_1_bias, qkv_weight, qkv_bias, out_weight, out_bias;
    Rows<T> ln_2_weight, ln_2_bias, fc_weight, fc_bias, proj_weight, proj_bias;

    Layer(Random& random, int64_t width, int64_t inner)
        : ln_1_weight(random, 1, width, {}, 0.1f, 1.0f), ln_1_bias(random, 1, width, {}, 0.1f),
          qkv_weight(random, width, 3 * width, {}, spread(width)),
          qkv_bias(random, 1, 3 * width, {}, 0.1f),
          out_weight(random, width, width, {}, spread(width)), out_bias(random, 1, width, {}, 0.1f),
          ln_2_weight(random, 1, width, {}, 0.1f, 1.0f), ln_2_bias(random, 1, width, {}, 0.1f),
          fc_weight(random, width, inner, {}, spread(width)), fc_bias(random, 1, inner, {}, 0.1f),
          proj_weight(random, inner, width, {}, spread(inner)),
          proj_bias(random, 1, width, {}, 0.1f) {}

    static float spread(int64_t inputs) { return 1.0f / std::sqrt(float(inputs)); }
};

template <class T>
Matrix product(const Matrix& x, const Rows<T>& weight, const Rows<T>& bias, int64_t outputs) {
    Matrix result;
    for (const std::vector<double>& row : x) {
        result.emplace_back();
        for (int64_t n = 0; n < outputs; ++n) {
            double sum = bias(0, n);
            for (size_t c = 0; c < row.size(); ++c) sum += row[c] * weight(int64_t(c), n);
            result.back().push_back(sum);
        }
    }
    return result;
}

template <class T>
Matrix normal(Matrix x, const Rows<T>& weight, const Rows<T>& bias, double eps) {
    for (std::vector<double>& row : x) {
        double mean = 0, square = 0;
        for (const double value : row) mean += value / double(row.size());
        for (const double value : row) square += (value - mean) * (value - mean);
        const double rstd = 1 / std::sqrt(square / double(row.size()) + eps);
        for (size_t c = 0; c < row.size(); ++c) {
            row[c] = (row[c] - mean) * rstd * weight(0, int64_t(c)) + bias(0, int64_t(c));
        }
    }
    return x;
}

void add(Matrix& x, const Matrix& y) {
    for (size_t r = 0; r < x.size(); ++r) {
        for (size_t c = 0; c < x[r].size(); ++c) x[r][c] += y[r][c];
    }
}

double gelu(double z) {
    return z / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
}

struct Model {
    int64_t width, inner, heads, vocab, layers;
};

template <class T, class C>
void step(const Model& model, int64_t entries, const std::vector<int64_t>& lengths) {
    const auto& [width, inner, heads, vocab, layer_count] = model;
    const int64_t batch = int64_t(lengths.size()), head_dim = width / heads;
    constexpr bool is_int8 = std::is_same_v<C, int8_t>;
    const float eps = 1e-5f;
    Random random;
    const Rows<T> wte(random, vocab, width, {}, 0.5f), wpe(random, entries, width, {}, 0.3f);
    const Rows<T> ln_weight(random, 1, width, {}, 0.1f, 1.0f), ln_bias(random, 1, width, {}, 0.1f);
    const Buffer<int64_t> tokens = random.below(vocab, batch), length = integers(lengths);
    std::vector<std::unique_ptr<Layer<T>>> layers;
    std::vector<std::unique_ptr<CacheMemory<C>>> caches;      // keys and values are two parts
    std::vector<std::unique_ptr<CacheMemory<float>>> scales;  // of int8 caches, likewise
    std::vector<launch::DecodeLayer> given;
    for (int64_t i = 0; i < layer_count; ++i) {
        layers.push_back(std::make_unique<Layer<T>>(random, width, inner));
        caches.push_back(
            std::make_unique<CacheMemory<C>>(HeadsShape{batch, entries, heads, head_dim}, 2));
        scales.push_back(std::make_unique<CacheMemory<float>>(factors(caches.back()->shape(), 2)));
        for (int64_t row = 0; row < batch; ++row) {
            for (int64_t entry = 0; entry < lengths[size_t(row)]; ++entry) {
                caches.back()->fill(random, row, entry);
                scales.back()->fill(random, row, entry, 0.02f);
            }
        }
        const Layer<T>& layer = *layers.back();
        const auto matrix = [](const Rows<T>& x) -> launch::MatrixOf {
            return {x.data(), x.stride()};
        };
        given.push_back({layer.ln_1_weight.data(),
                         layer.ln_1_bias.data(),
                         matrix(layer.qkv_weight),
                         layer.qkv_bias.data(),
                         matrix(layer.out_weight),
                         layer.out_bias.data(),
                         layer.ln_2_weight.data(),
                         layer.ln_2_bias.data(),
                         matrix(layer.fc_weight),
                         layer.fc_bias.data(),
                         matrix(layer.proj_weight),
                         layer.proj_bias.data(),
                         {caches.back()->heads(0), caches.back()->heads(1)},
                         {scales.back()->heads(0), scales.back()->heads(1)},
                         0.3f / float(i + 1)});
    }
    Buffer<T> logits(batch * vocab);
    launch::DecodeStep args{};
    args.wte = {wte.data(), wte.stride()};
    args.wpe = {wpe.data(), wpe.stride()};
    args.wte_rows = vocab;
    args.wpe_rows = entries;
    args.layers = given.data();
    args.layer_count = layer_count;
    args.ln_f_weight = ln_weight.data();
    args.ln_f_bias = ln_bias.data();
    args.projection = args.wte;
    args.tokens = {tokens.data(), 1};
    args.positions = args.lengths = {length.data(), 1};
    args.logits = logits.data();
    args.batch = batch;
    args.width = width;
    args.inner = inner;
    args.heads = heads;
    args.head_dim = head_dim;
    args.entries = entries;
    args.vocab = vocab;
    args.eps = eps;
    args.dtype = dtype_of<T>;
    args.cache_dtype = dtype_of<C>;
    Buffer<float> work(launch::decode_work(args));
    Buffer<unsigned> tickets(launch::decode_tickets(args), 0u);
    args.work = work.data();
    args.tickets = tickets.data();
    launch::decode_step(args, nullptr);

    Matrix x;
    for (int64_t row = 0; row < batch; ++row) {
        x.emplace_back();
        for (int64_t c = 0; c < width; ++c) {
            x.back().push_back(wte(tokens[row], c) + wpe(lengths[size_t(row)], c));
        }
    }
    for (int64_t i = 0; i < layer_count; ++i) {
        const Layer<T>& layer = *layers[size_t(i)];
        // A number of the cache as it is read.
        const auto number = [&](int64_t part, int64_t row, int64_t entry, int64_t c) {
            const int64_t head = c / head_dim;
            const double factor =
                is_int8 ? double(scales[size_t(i)]->at(part, row, entry, head, 0)) : 1.0;
            return factor * to_double(caches[size_t(i)]->at(part, row, entry, head, c % head_dim));
        };
        const Matrix qkv = product(normal(x, layer.ln_1_weight, layer.ln_1_bias, eps),
                                   layer.qkv_weight, layer.qkv_bias, 3 * width);
        Matrix attended(x.size(), std::vector<double>(size_t(width), 0.0));
        for (int64_t row = 0; row < batch; ++row) {
            const int64_t newest = lengths[size_t(row)];
            for (int64_t head = 0; head < heads; ++head) {
                const size_t first = size_t(head * head_dim);
                std::vector<double> weights;
                double total = 0;
                for (int64_t entry = 0; entry <= newest; ++entry) {
                    double score = 0;
                    for (int64_t d = 0; d < head_dim; ++d) {
                        score += qkv[size_t(row)][first + size_t(d)] *
                                 number(0, row, entry, head * head_dim + d);
                    }
                    weights.push_back(std::exp(score * double(given[size_t(i)].scale)));
                    total += weights.back();
                }
                for (int64_t entry = 0; entry <= newest; ++entry) {
                    for (int64_t d = 0; d < head_dim; ++d) {
                        attended[size_t(row)][first + size_t(d)] +=
                            weights[size_t(entry)] / total *
                            number(1, row, entry, head * head_dim + d);
                    }
                }
            }
            for (int64_t part = 0; part < 2; ++part) {
                for (int64_t c = 0; c < width; ++c) {
                    const double exact = qkv[size_t(row)][size_t((part + 1) * width + c)];
                    const double stored = number(part, row, newest, c);
                    const double allowed = is_int8 ? 0.51 * double(scales[size_t(i)]->at(
                                                                part, row, newest, c / head_dim, 0))
                                                   : 4 * epsilon<C> * (1 + std::abs(exact));
                    const std::string place = (part == 0 ? "key of row " : "value of row ") +
                                              std::to_string(row) + ", element " +
                                              std::to_string(c);
                    expect_near(stored, exact, allowed, place);
                    if (newest + 1 == entries) continue;
                    expect_unwritten(number(part, row, newest + 1, c), place + " one entry on");
                }
            }
        }
        add(x, product(attended, layer.out_weight, layer.out_bias, width));
        Matrix hidden = product(normal(x, layer.ln_2_weight, layer.ln_2_bias, eps), layer.fc_weight,
                                layer.fc_bias, inner);
        for (std::vector<double>& row : hidden) {
            for (double& value : row) value = gelu(value);
        }
        add(x, product(hidden, layer.proj_weight, layer.proj_bias, width));
    }
    x = normal(x, ln_weight, ln_bias, eps);
    std::vector<double> exact;
    for (const std::vector<double>& row : x) {
        for (int64_t token = 0; token < vocab; ++token) {
            double sum = 0;
            for (int64_t c = 0; c < width; ++c) sum += row[size_t(c)] * wte(token, c);
            exact.push_back(sum);
        }
    }
    expect_close(logits, exact, 4,
                 name_of<T>() + " and " + name_of<C>() + ", batch " + std::to_string(batch));
    for (int64_t i = 0; i < tickets.size(); ++i) {
        expect_same(tickets[i], 0, "ticket " + std::to_string(i));
    }
}

CASE("decode_step, one row to nine") {
    step<float, float>({64, 128, 2, 70, 1}, 6, {5});
    step<bf16, bf16>({64, 128, 2, 70, 1}, 6, {0, 3});
    step<fp16, fp16>({64, 128, 2, 70, 1}, 6, {0, 5, 2});
    step<bf16, bf16>({32, 64, 1, 33, 1}, 6, {0, 5, 2, 3, 1, 4, 0, 5, 1});
}

CASE("decode_step, two layers, a cache in another dtype") {
    step<float, bf16>({32, 64, 1, 33, 2}, 100, {90});
    step<bf16, float>({32, 64, 1, 33, 2}, 4, {1, 2});
}

CASE("decode_step, a cache of 8 bits") {
    step<float, int8_t>({64, 128, 2, 33, 2}, 100, {90, 3});
    step<bf16, int8_t>({32, 64, 1, 33, 1}, 6, {0, 5, 2, 3, 1, 4, 0, 5, 1});
    step<fp16, int8_t>({30, 50, 2, 31, 1}, 5, {4});
}

CASE("decode_step of odd widths") {
    step<float, float>({51, 70, 3, 65, 1}, 5, {2, 4});
    step<bf16, bf16>({30, 50, 2, 31, 1}, 5, {4});
}

// Every kernel once: all dtypes, aligned and not, and as many rows as they are compiled for.
template <class T>
void step_of_all_kinds() {
    for (const int64_t batch : {1, 2, 4, 8}) {
        const std::vector<int64_t> lengths(size_t(batch), 1);
        step<T, T>({16, 32, 1, 9, 1}, 3, lengths);
        step<T, T>({15, 21, 1, 9, 1}, 3, lengths);
    }
}

CASE("decode_step of every dtype, alignment and number of rows") {
    step_of_all_kinds<float>();
    step_of_all_kinds<bf16>();
    step_of_all_kinds<fp16>();
}

CASE("decode_step past the end of a row") {
    expect_error("__trap", [] { step<float, float>({32, 32, 1, 8, 1}, 3, {1, 3}); });
}

}  // namespace
}  // namespace gpt2fast::simulated
