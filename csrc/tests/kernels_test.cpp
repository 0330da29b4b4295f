// Vectors, products and attention of one instruction set, each against double precision.
#include "packing.h"

#include "cpu/prelude.h"
#include GPT2FAST_SIMD
#include "cpu/simd/math.h"

#include "cpu/attention.h"
#include "cpu/gemm.h"

namespace {

using namespace gpt2fast::GPT2FAST_ISA;
using gpt2fast::bfloat16;
using gpt2fast::float16;
using gpt2fast::Format;
using testing::expect;
using testing::expect_close;
using testing::Matrix;
using testing::Random;

// Loads and stores of every length leave their neighbors alone.
template <typename T>
void vectors_keep_to_their_length() {
    Random random;
    for (int offset = 0; offset < 3; ++offset) {
        for (int n = 1; n <= Vec::width; ++n) {
            constexpr int margin = Vec::width + 4;
            std::vector<T> from(size_t(offset + n));  // the end of the memory
            std::vector<T> to(size_t(offset + n + margin), T{});
            for (T& x : from) gpt2fast::assign(x, random.normal());
            if (n < Vec::width) {
                Vec::load(from.data() + offset, n).store(to.data() + offset, n);
                float whole[Vec::width];
                Vec::load(from.data() + offset, n).store(whole);
                for (int i = n; i < Vec::width; ++i) expect(whole[i] == 0, "the rest is not zero");
            } else {
                Vec::load(from.data() + offset).store(to.data() + offset);
            }
            for (int i = 0; i < offset + n + margin; ++i) {
                const bool copied = i >= offset && i < offset + n;
                expect(gpt2fast::to_float(to[size_t(i)]) ==
                           (copied ? gpt2fast::to_float(from[size_t(i)]) : 0.0f),
                       "length " + std::to_string(n) + ", element " + std::to_string(i - offset));
            }
        }
    }
}

void bfloat16_is_rounded_to_nearest_even() {
    Random random;
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> values = {
        0.0f,           -0.0f,          1.00390625f, 1.01171875f, -1.00390625f,
        3.38953139e38f, 3.40282347e38f, infinity,    -infinity,   NAN};
    while (values.size() % Vec::width || values.size() < 1000) {
        values.push_back(random.normal() * std::exp2(float(random.below(60) - 30)));
    }
    for (size_t i = 0; i < values.size(); i += Vec::width) {
        bfloat16 narrow[Vec::width];
        Vec::load(values.data() + i).store(narrow);
        for (int j = 0; j < Vec::width; ++j) {
            const float x = values[i + size_t(j)];
            expect(std::isnan(x) ? std::isnan(gpt2fast::to_float(narrow[j]))
                                 : narrow[j].bits == gpt2fast::to_bfloat16(x).bits,
                   "bfloat16 of " + std::to_string(x));
        }
    }
}

void every_float16_is_widened_exactly() {
    for (int bits = 0; bits < 65536; bits += Vec::width) {
        float16 halves[Vec::width];
        float wide[Vec::width];
        for (int j = 0; j < Vec::width; ++j) halves[j].bits = uint16_t(bits + j);
        Vec::load(halves).store(wide);
        for (int j = 0; j < Vec::width; ++j) {
            const int exponent = (bits + j) >> 10 & 31, rest = (bits + j) & 1023;
            double exact =
                exponent == 0 ? std::ldexp(rest, -24) : std::ldexp(1024 + rest, exponent - 25);
            if (exponent == 31) exact = rest ? NAN : std::numeric_limits<double>::infinity();
            const bool negative = (bits + j) >> 15;
            if (negative) exact = -exact;
            for (const float x : {wide[j], gpt2fast::to_float(halves[j])}) {
                expect(std::isnan(exact) ? std::isnan(x)
                                         : double(x) == exact && std::signbit(x) == negative,
                       "the float16 of bits " + std::to_string(bits + j));
            }
        }
    }
}

void bytes_are_rounded_and_saturated() {
    const float values[] = {0.5f,   1.5f, 2.5f,    -0.5f, -1.5f,  -2.5f, 126.6f, 127.4f,
                            128.0f, 1e6f, -128.6f, -1e6f, 99.49f, -3.5f, 3.51f,  0.0f};
    for (int i = 0; i < 16; i += Vec::width) {
        int8_t bytes[Vec::width];
        Vec::load(values + i).store(bytes);
        for (int j = 0; j < Vec::width; ++j) {
            const float nearest = std::nearbyint(values[i + j]);
            expect(float(bytes[j]) == std::min(127.0f, std::max(-128.0f, nearest)),
                   "the byte of " + std::to_string(values[i + j]));
        }
    }
}

// Every unsigned byte times every signed one that a row can hold, beside the largest products of
// either sign: the sums are exact, hence the same on every instruction set.
void products_of_bytes_are_exact() {
    constexpr int lanes = Vec::width;
    for (int a = 0; a < 256; ++a) {
        uint8_t w[4 * lanes];
        for (int i = 0; i < lanes; ++i) {
            const int bytes[] = {a, 255 - a * (i & 1), a, (a + i) % 256};
            for (int j = 0; j < 4; ++j) w[4 * i + j] = uint8_t(bytes[j]);
        }
        const Words words = Words::load(w), flipped = flip_signs(words);
        for (int b = -127; b <= 127; ++b) {
            const int8_t x[] = {int8_t(b), 127, int8_t(b / 2), -127};
            float sums[lanes], of_flipped[lanes];
            dot_int8(IntVec(b), words, Words::broadcast(x)).to_float().store(sums);
            dot_int8(IntVec(0), flipped, Words::broadcast(x)).to_float().store(of_flipped);
            for (int i = 0; i < lanes; ++i) {
                int exact = b, exact_of_flipped = 0;
                for (int j = 0; j < 4; ++j) {
                    exact += (w[4 * i + j] - dot_offset) * x[j];
                    exact_of_flipped += ((w[4 * i + j] ^ 128) - dot_offset) * x[j];
                }
                expect(sums[i] == float(exact) && of_flipped[i] == float(exact_of_flipped),
                       "the sum of products of " + std::to_string(a) + " and " + std::to_string(b));
            }
        }
    }
}

template <typename Ours, typename Exact>
void check_function(const char* name, float low, float high, double units, Ours ours, Exact exact) {
    constexpr int steps = 40000;
    for (int i = 0; i < steps; i += Vec::width) {
        float x[Vec::width], y[Vec::width];
        for (int j = 0; j < Vec::width; ++j) x[j] = low + (high - low) * float(i + j) / steps;
        ours(Vec::load(x)).store(y);
        for (int j = 0; j < Vec::width; ++j) {
            const double want = exact(double(x[j]));
            const double unit = std::max(std::fabs(want), 1e-37) * 0x1p-23;
            expect(std::fabs(y[j] - want) <= units * unit,
                   std::string(name) + "(" + std::to_string(x[j]) + ") = " + std::to_string(y[j]));
        }
    }
}

void functions_are_accurate() {
    check_function(
        "exp", -87.0f, 88.0f, 4, [](Vec x) { return exp(x); },
        [](double x) { return std::exp(x); });
    check_function(
        "tanh", -10.0f, 10.0f, 4, [](Vec x) { return tanh(x); },
        [](double x) { return std::tanh(x); });
    // Relative to the result; where that is nearly zero, exp's argument has lost digits.
    check_function(
        "gelu", -3.0f, 10.0f, 30, [](Vec x) { return gelu(x); },
        [](double x) {
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        });
    float y[Vec::width];
    exp(Vec(200.0f)).store(y);
    expect(std::isinf(y[0]), "exp(200) is not infinite");
    exp(Vec(-std::numeric_limits<float>::infinity())).store(y);
    expect(y[0] == 0.0f, "exp(-inf) is not 0");
    exp(Vec(NAN)).store(y);
    expect(std::isnan(y[0]), "exp(NaN) is a number");
}

// A row as the matmul rounds it before it multiplies.
std::vector<double> as_multiplied(const std::vector<float>& x, const Matrix& w) {
    std::vector<double> row(x.begin(), x.end());
    if (w.format == Format::bfloat16) {
        for (double& value : row) value = gpt2fast::to_float(gpt2fast::to_bfloat16(float(value)));
    }
    for (int64_t begin = 0; w.group && begin < w.inputs; begin += w.group) {
        const int64_t end = std::min(begin + w.group, w.inputs);
        float most = 0.0f;
        for (int64_t k = begin; k < end; ++k) most = std::max(most, std::fabs(x[size_t(k)]));
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        for (int64_t k = begin; k < end; ++k) {
            row[size_t(k)] = std::nearbyint(x[size_t(k)] * inverse) * double(most / 127.0f);
        }
    }
    return row;
}

// The product of a row with column n of quantized weights bit by bit as every instruction set with
// fused multiply-adds has it: exact sums of integers in each group, scaled in float32 in the order
// of the groups.
float scaled_sum(const std::vector<float>& x, const Matrix& w, int64_t n) {
    const int64_t size = 2 * gpt2fast::panel_columns +
                         w.group * gpt2fast::panel_columns / (w.format == Format::int8 ? 1 : 2);
    float sum = 0.0f;
    for (int64_t begin = 0; begin < w.inputs; begin += w.group) {
        const int64_t end = std::min(begin + w.group, w.inputs);
        gpt2fast::float16 half;
        std::memcpy(&half,
                    w.panels.data() + n / gpt2fast::panel_columns * w.panel_size +
                        begin / w.group * size + 2 * (n % gpt2fast::panel_columns),
                    2);
        const float scale = gpt2fast::to_float(half);
        float most = 0.0f;
        for (int64_t k = begin; k < end; ++k) most = std::max(most, std::fabs(x[size_t(k)]));
        const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
        double dot = 0.0;
        for (int64_t k = begin; k < end; ++k) {
            dot += std::nearbyint(x[size_t(k)] * inverse) *
                   std::nearbyint(w.values[size_t(k * w.outputs + n)] / scale);
        }
        float lanes[Vec::width];  // portable code may round the product
        fma(Vec(float(dot)), Vec(scale * (most / 127.0f)), Vec(sum)).store(lanes);
        sum = lanes[0];
    }
    return sum;
}

// With integers of one sign the rows are -2, so that no sum can be larger.
void matmuls_are_exact(Format format, testing::Integers integers) {
    Random random;
    const bool any = integers == testing::Integers::any;
    for (int64_t group : {32, 64}) {
        for (int64_t inputs : {1, 3, 64, 100, 192}) {
            const Matrix w(random, format, inputs, 40, group, integers);
            const gpt2fast::PackedMatrix packed = {format,  inputs, w.padded_inputs(), w.outputs,
                                                   w.group, 0,      w.panel_size,      -1};
            for (int rows = 1; rows <= most_rows(format); ++rows) {
                std::vector<uint8_t> tile(size_t(PackedRows::size(packed, rows)));
                const PackedRows to = packed_rows(packed, tile.data());
                std::vector<float> ours(size_t(rows * 64));
                std::vector<double> exact(size_t(rows * 64));
                std::vector<float> bits(size_t(rows * 64));
                for (int r = 0; r < rows; ++r) {
                    // A row of zeros has no scale.
                    const std::vector<float> x = any ? random.normals(inputs, r == 1 ? 0.0f : 2.0f)
                                                     : std::vector<float>(size_t(inputs), -2.0f);
                    pack_row(x.data(), inputs, to, tile.data(), rows, r);
                    const std::vector<double> row = as_multiplied(x, w);
                    for (int64_t n = 0; n < w.outputs; ++n) {
                        if (w.group)
                            bits[size_t(n / 32 * rows * 32 + r * 32 + n % 32)] =
                                scaled_sum(x, w, n);
                        for (int64_t k = 0; k < inputs; ++k) {
                            exact[size_t(n / 32 * rows * 32 + r * 32 + n % 32)] +=
                                row[size_t(k)] * w.values[size_t(k * w.outputs + n)];
                        }
                    }
                }
                for (int panel = 0; panel < 2; ++panel) {
                    const uint8_t* begin = w.panels.data() + panel * w.panel_size;
                    multiply_for(format, rows)(begin, tile.data(), to,
                                               ours.data() + panel * rows * 32, {});
                }
                const std::string what =
                    std::to_string(rows) + " rows of " + std::to_string(inputs);
                expect_close(ours, exact, 1e-6, what);
                if (rows == 1 && !w.group) {
                    std::vector<float> pair(ours.size());
                    multiply_pair_for(format)(w.panels.data(), tile.data(), to, pair.data(), {},
                                              {});
                    expect(pair == ours, what + ": two panels at once have other bits");
                }
                if (w.group) {
                    expect(ours == bits, what + ": not the bits that integers give");
                }
            }
            for (int64_t column : {int64_t(0), int64_t(33), w.outputs - 1}) {
                std::vector<float> ours(static_cast<size_t>(inputs));
                unpack_column(packed, w.panels.data(), column, ours.data());
                for (int64_t k = 0; k < inputs; ++k) {
                    expect(ours[size_t(k)] == float(w.values[size_t(k * w.outputs + column)]),
                           "a column is not what was packed");
                }
            }
        }
    }
}

// No byte holds NaN or infinity: the products of such a row are NaN, and those of tiny numbers
// tiny.
void narrowed_groups_keep_what_no_byte_holds() {
    for (const float x : {float(NAN), float(INFINITY), -float(INFINITY), 1e-40f}) {
        float values[32] = {x, 1e-39f};
        int8_t narrow[32 + Vec::width];
        const NarrowGroup made = narrow_group(values, 32, narrow);
        expect(std::isfinite(x) ? made.scale < 1e-30f : std::isnan(made.scale),
               "the scale of a group with " + std::to_string(x));
        expect(made.sum == 0, "the sum of a group with " + std::to_string(x));
    }
}

template <typename T>
std::vector<T> stored(const std::vector<float>& values) {
    std::vector<T> out(values.size());
    for (size_t i = 0; i < values.size(); ++i) gpt2fast::assign(out[i], values[i]);
    return out;
}

// Queries first .. first + queries - 1 against keys and values that lie `stride` apart.
template <typename T>
void attention_is_exact(double tolerance) {
    Random random;
    for (int64_t dim : {2, 16, 30, 64, 96}) {
        for (int64_t first : {0, 5, 70, 300}) {
            for (int queries : {1, 7, 32}) {
                const int64_t entries = first + queries, stride = dim + 6;
                const std::vector<float> q = random.normals(queries * stride);
                // The last entry ends where the memory does.
                const auto k = stored<T>(random.normals((entries - 1) * stride + dim));
                const auto v = stored<T>(random.normals((entries - 1) * stride + dim));
                const float scale = 0.3f;
                std::vector<float> scratch(size_t(attention_scratch(dim)));
                std::vector<float> out(size_t(queries * dim));
                attend_block<T>(q.data(), stride, queries, first, Entries<T>{k.data(), stride},
                                Entries<T>{v.data(), stride}, int(dim), scale, scratch.data(),
                                out.data(), dim, nullptr);
                std::vector<double> exact(out.size());
                for (int i = 0; i < queries; ++i) {
                    std::vector<double> weights(size_t(first + i + 1));
                    double total = 0;
                    for (size_t t = 0; t < weights.size(); ++t) {
                        double score = 0;
                        for (int64_t d = 0; d < dim; ++d) {
                            T narrow;  // queries take the keys' precision
                            gpt2fast::assign(narrow, q[size_t(i * stride + d)]);
                            score += double(gpt2fast::to_float(narrow)) *
                                     gpt2fast::to_float(k[t * size_t(stride) + size_t(d)]);
                        }
                        total += weights[t] = std::exp(score * scale);
                    }
                    for (size_t t = 0; t < weights.size(); ++t) {
                        for (int64_t d = 0; d < dim; ++d) {
                            exact[size_t(i * dim + d)] +=
                                weights[t] / total *
                                gpt2fast::to_float(v[t * size_t(stride) + size_t(d)]);
                        }
                    }
                }
                const std::string shape = std::to_string(queries) + " queries behind " +
                                          std::to_string(first) + ", size " + std::to_string(dim);
                expect_close(out, exact, tolerance, shape);
                if (queries == 1) {
                    const CachedHeads<T> keys = {k.data(), stride, nullptr, 0};
                    const CachedHeads<T> values = {v.data(), stride, nullptr, 0};
                    std::vector<float> part(static_cast<size_t>(dim));
                    std::vector<float> single(
                        static_cast<size_t>(attend_heads_scratch(1, dim, entries)));
                    float largest[2], total[2];
                    const PartSums sums = {out.data(), largest, total};
                    const PartSums later = {part.data(), largest + 1, total + 1};
                    const auto attend = [&](int64_t begin, int64_t end, const PartSums& to) {
                        attend_heads<T>(q.data(), 1, begin, end, keys, values, int(dim), scale,
                                        begin == 0, single.data(), to);
                    };
                    attend(0, entries, sums);
                    divide_by_total(sums, 1, int(dim));
                    expect_close(out, exact, tolerance, "one query, " + shape);
                    const std::vector<float> whole = out;
                    for (int64_t begin = 0; begin < entries; begin += part_entries) {
                        attend(begin, std::min(begin + part_entries, entries),
                               begin == 0 ? sums : later);
                        if (begin > 0) add_part(later, 1, int(dim), sums);
                    }
                    divide_by_total(sums, 1, int(dim));
                    expect(out == whole, "one query in parts, " + shape + ": other bits");
                    attend(0, std::min<int64_t>(part_entries, entries), later);
                    *later.total = std::numeric_limits<float>::quiet_NaN();
                    add_part(later, 1, int(dim), sums);
                    divide_by_total(sums, 1, int(dim));
                    expect(std::isnan(out[0]), "a part that is not a number is left out");
                }
            }
        }
    }
}

// One query of each of some heads whose size fills vectors of words, against entries of bytes.
void attention_to_bytes_is_exact() {
    Random random;
    for (int dim : {64, 96, 128}) {
        for (int heads : {1, 3, 17}) {
            for (int64_t entries : {1, 5, 40, 140}) {
                const int64_t width = int64_t(heads) * dim;
                const std::vector<float> q = random.normals(width);
                std::vector<int8_t> k(size_t(entries * width)), v(k.size());
                std::vector<float> k_scales(size_t(entries * heads)), v_scales(k_scales.size());
                for (size_t i = 0; i < k.size(); ++i) {
                    k[i] = int8_t(random.below(255) - 127);
                    v[i] = int8_t(random.below(255) - 127);
                }
                for (size_t i = 0; i < k_scales.size(); ++i) {
                    k_scales[i] = 0.002f * float(1 + random.below(5));
                    v_scales[i] = 0.004f * float(1 + random.below(5));
                }
                const float scale = 0.3f;
                std::vector<float> scratch(size_t(attend_heads_scratch(heads, dim, entries)));
                std::vector<float> out(q.size());
                std::vector<float> largest(static_cast<size_t>(heads)), total(largest.size());
                const PartSums sums = {out.data(), largest.data(), total.data()};
                attend_heads<int8_t>(q.data(), heads, 0, entries,
                                     {k.data(), width, k_scales.data(), heads},
                                     {v.data(), width, v_scales.data(), heads}, dim, scale, true,
                                     scratch.data(), sums);
                divide_by_total(sums, heads, dim);
                std::vector<double> exact(out.size());
                for (int h = 0; h < heads; ++h) {
                    const float* query = q.data() + h * dim;
                    float most = 0.0f;
                    for (int d = 0; d < dim; ++d) most = std::max(most, std::fabs(query[d]));
                    const bool whole = dim % Query<int8_t>::vector_inputs == 0;
                    double total = 0.0;
                    for (int64_t t = 0; t < entries; ++t) {
                        double score = 0.0;
                        for (int d = 0; d < dim; ++d) {
                            const double x = whole ? std::nearbyint(query[d] * (127.0f / most)) *
                                                         double(most / 127.0f)
                                                   : double(query[d]);
                            score += x * k[size_t(t * width + h * dim + d)];
                        }
                        const size_t at = size_t(t * heads + h);
                        const double weight = std::exp(score * double(k_scales[at]) * scale);
                        total += weight;
                        for (int d = 0; d < dim; ++d) {
                            exact[size_t(h * dim + d)] +=
                                weight * double(v_scales[at]) * v[size_t(t * width + h * dim + d)];
                        }
                    }
                    for (int d = 0; d < dim; ++d) exact[size_t(h * dim + d)] /= total;
                }
                expect_close(out, exact, 1e-4,
                             std::to_string(heads) + " heads of " + std::to_string(dim));
            }
        }
    }
}

}  // namespace

bool test_kernels() {
    using testing::formats;
    using testing::name_of;
    using testing::passes;
    bool fine = passes("float32 keeps to its length", vectors_keep_to_their_length<float>);
    fine &= passes("bfloat16 keeps to its length", vectors_keep_to_their_length<bfloat16>);
    fine &= passes("bfloat16 is rounded", bfloat16_is_rounded_to_nearest_even);
    fine &= passes("float16 is widened", every_float16_is_widened_exactly);
    fine &= passes("bytes are rounded", bytes_are_rounded_and_saturated);
    fine &= passes("products of bytes are exact", products_of_bytes_are_exact);
    fine &= passes("functions are accurate", functions_are_accurate);
    fine &= passes("attention to bytes", attention_to_bytes_is_exact);
    fine &= passes("narrowed groups keep NaN", narrowed_groups_keep_what_no_byte_holds);
    for (Format format : formats) {
        const std::string name = std::string("products of ") + name_of(format);
        fine &= passes(name.c_str(), [&] { matmuls_are_exact(format, testing::Integers::any); });
        if (!testing::is_quantized(format)) continue;
        fine &= passes((name + ", largest sums").c_str(), [&] {
            matmuls_are_exact(format, testing::Integers::lowest);
            matmuls_are_exact(format, testing::Integers::highest);
        });
    }
    fine &= passes("attention in float32", [] { attention_is_exact<float>(2e-6); });
    fine &= passes("attention in bfloat16", [] { attention_is_exact<bfloat16>(4e-3); });
    return fine;
}
