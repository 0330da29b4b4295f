// Products against float64, of positive numbers (nothing cancels), at shapes that fill neither tile
// nor panel. Every buffer is as large as it must be and lies on the heap, so that a sanitizer sees
// a step beyond it.
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"
#include "testing.h"

namespace {

using gpt2fast::bfloat16;
using gpt2fast::DType;
using gpt2fast::Format;
using gpt2fast::kernels;
using gpt2fast::Matmul;
using gpt2fast::to_float;
using gpt2fast::View;
using testing::expect;
using testing::expect_close;
using testing::Random;

template <typename T>
constexpr DType dtype_of() {
    return std::is_same<T, float>::value ? DType::float32 : DType::bfloat16;
}

// Lines of inputs, contiguous along one or the other.
template <typename T>
struct Lines {
    std::vector<T> values;
    int64_t line_stride, input_stride;

    Lines(Random& random, int64_t lines, int64_t inputs, bool across) {
        line_stride = across ? 1 : inputs + 3;
        input_stride = across ? lines + 3 : 1;
        values.resize(size_t((lines - 1) * line_stride + (inputs - 1) * input_stride + 1));
        for (T& x : values) gpt2fast::assign(x, std::fabs(random.normal()));
    }
    View view() const { return {values.data(), line_stride, input_stride, dtype_of<T>()}; }
    // As it is multiplied.
    double at(int64_t line, int64_t input, Format format) const {
        const float x = to_float(values[size_t(line * line_stride + input * input_stride)]);
        return format == Format::float32 ? x : to_float(gpt2fast::to_bfloat16(x));
    }
};

template <typename A, typename B, typename Out>
void check(Random& random, Format format, int64_t rows, int64_t inputs, int64_t columns, int layout,
           int threads) {
    const Lines<A> a(random, rows, inputs, layout & 1);
    const Lines<B> b(random, columns, inputs, layout & 2);
    const int64_t stride = columns + 5;
    std::vector<Out> out(size_t((rows - 1) * stride + columns));
    for (Out& x : out) gpt2fast::assign(x, 77.0f);
    std::vector<float> bias = random.normals(columns);
    std::vector<float> before = random.normals(rows * columns);
    for (float& x : bias) x = std::fabs(x);
    for (float& x : before) x = std::fabs(x);
    std::vector<float> sums(static_cast<size_t>(columns), 3.0f);

    Matmul args{};
    args.a = a.view();
    args.b = b.view();
    args.out = out.data();
    args.out_stride = stride;
    args.out_dtype = dtype_of<Out>();
    args.bias = bias.data();
    args.before = before.data();
    args.before_stride = columns;
    args.column_sums = sums.data();
    args.add_to_sums = layout & 1;
    args.rows = rows;
    args.columns = columns;
    args.inputs = inputs;
    args.format = format;
    args.plan = kernels().matmul_plan(args, threads);
    void* packed = std::aligned_alloc(64, size_t(args.plan.workspace + 63) / 64 * 64);
    args.packed = static_cast<float*>(packed);
    for (int64_t i = 0; i < args.plan.tiles; ++i) kernels().matmul_pack(args, i, i + 1);
    const int64_t items = args.plan.parts * args.plan.groups;
    for (int64_t i = 0; i < items; ++i) kernels().matmul(args, items - 1 - i, items - i);
    std::free(packed);

    const std::string what = std::to_string(rows) + " x " + std::to_string(inputs) + " x " +
                             std::to_string(columns) + ", layout " + std::to_string(layout) + ", " +
                             std::to_string(threads) + " threads";
    std::vector<float> ours;
    std::vector<double> exact, total(static_cast<size_t>(columns));
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            double sum = double(before[size_t(i * columns + j)]) + bias[size_t(j)];
            for (int64_t k = 0; k < inputs; ++k) sum += a.at(i, k, format) * b.at(j, k, format);
            exact.push_back(sum);
            ours.push_back(to_float(out[size_t(i * stride + j)]));
        }
        for (int64_t j = columns; i + 1 < rows && j < stride; ++j) {
            expect(to_float(out[size_t(i * stride + j)]) == 77.0f, what + ": wrote between rows");
        }
    }
    expect_close(ours, exact, std::is_same<Out, float>::value ? 1e-6 : 4e-3, what);
    for (int64_t j = 0; j < columns; ++j) {
        total[size_t(j)] = layout & 1 ? 3.0 : 0.0;
        for (int64_t k = 0; k < inputs; ++k) total[size_t(j)] += b.at(j, k, format);
    }
    expect_close(sums, total, 2e-6, what + ": sums of columns");
}

template <typename A, typename B, typename Out>
void matmuls_are_exact(Format format) {
    Random random;
    for (int64_t rows : {1, 17, 30}) {
        for (int64_t inputs : {1, 7, 64, 101}) {
            for (int64_t columns : {1, 32, 49, 130}) {
                for (int layout = 0; layout < 4; ++layout) {
                    for (int threads : {1, 3}) {
                        check<A, B, Out>(random, format, rows, inputs, columns, layout, threads);
                    }
                }
            }
        }
    }
}

// Which thread computes what changes nothing.
void threads_do_not_change_the_result() {
    Random random;
    const Lines<float> a(random, 100, 64, false), b(random, 200, 64, true);
    std::vector<std::vector<float>> results;
    for (int threads : {1, 2, 7}) {
        std::vector<float> out(100 * 200);
        Matmul args{};
        args.a = a.view();
        args.b = b.view();
        args.out = out.data();
        args.out_stride = args.columns = 200;
        args.rows = 100;
        args.inputs = 64;
        args.format = Format::float32;
        args.plan = kernels().matmul_plan(args, threads);
        std::vector<float> packed(size_t(args.plan.workspace) / 4);
        args.packed = packed.data();
        kernels().matmul_pack(args, 0, args.plan.tiles);
        kernels().matmul(args, 0, args.plan.parts * args.plan.groups);
        results.push_back(out);
    }
    expect(results[0] == results[1] && results[0] == results[2], "a bit differs");
}

}  // namespace

int main() {
    testing::need_kernels();
    using testing::passes;
    bool fine = passes("products of float32",
                       [] { matmuls_are_exact<float, float, float>(Format::float32); });
    fine &= passes("products of bfloat16",
                   [] { matmuls_are_exact<bfloat16, bfloat16, bfloat16>(Format::bfloat16); });
    fine &= passes("products of bfloat16 with float32 weights", [] {
        matmuls_are_exact<bfloat16, float, bfloat16>(Format::bfloat16);
        matmuls_are_exact<float, bfloat16, float>(Format::bfloat16);
    });
    fine &= passes("threads do not change the result", threads_do_not_change_the_result);
    return fine ? 0 : 1;
}
