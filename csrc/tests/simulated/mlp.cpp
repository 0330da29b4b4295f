// Cases for launch/mlp.h.
#include "launch/mlp.h"

#include "rows.h"

namespace gpt2fast::simulated {
namespace {

struct Shape {
    int64_t rows, columns;
    Layout x, grad, bias = {};
};

template <class T>
std::string name_of_case(const Shape& shape) {
    return name_of<T>() + " " + std::to_string(shape.rows) + " x " + std::to_string(shape.columns) +
           " offset " + std::to_string(shape.x.offset) + " gap " + std::to_string(shape.x.gap);
}

double tanh_of(double z) {
    return std::tanh(std::sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z));
}

double gelu(double z) { return z / 2 * (1 + tanh_of(z)); }

double gelu_slope(double z) {
    const double tanh = tanh_of(z);
    const double inner = std::sqrt(2 / 3.14159265358979323846) * (1 + 3 * 0.044715 * z * z);
    return (1 + tanh) / 2 + z / 2 * (1 - tanh * tanh) * inner;
}

// Where a float32 result's error is relative to: what is added up to it is about 1.
template <class T>
constexpr double scale = std::is_same_v<T, float> ? 1.0 : 0x1p-6;
template <class T>
constexpr double multiple = std::is_same_v<T, float> ? 32 : 0.55;

template <class T>
void forward(const Shape& shape) {
    const int64_t rows = shape.rows, columns = shape.columns;
    Random random;
    const Rows<T> x(random, rows, columns, shape.x, 2.0f);
    const Rows<T> bias(random, 1, columns, shape.bias);
    Buffer<T> out(rows * columns);
    launch::BiasGelu args{};
    args.x = x.data();
    args.bias = bias.data();
    args.out = out.data();
    args.rows = rows;
    args.columns = columns;
    args.x_stride = x.stride();
    args.dtype = dtype_of<T>;
    launch::bias_gelu(args, nullptr);

    std::vector<double> exact;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) exact.push_back(gelu(x(r, c) + bias(0, c)));
    }
    expect_each(out, exact, multiple<T>, scale<T>, "bias_gelu " + name_of_case<T>(shape));
}

enum class Results { all, without_activation, in_place };

template <class T>
void backward(const Shape& shape, Results results) {
    const std::string what = "bias_gelu_backward " + name_of_case<T>(shape);
    const int64_t rows = shape.rows, columns = shape.columns;
    Random random;
    const Rows<T> x(random, rows, columns, shape.x, 1.5f);
    const Rows<T> bias(random, 1, columns, shape.bias);
    const Rows<T> grad(random, rows, columns, shape.grad, 1.0f, 0.25f);
    Buffer<T> in_place = grad.packed(), apart(rows * columns), activated(rows * columns);
    Buffer<T>& grad_x = results == Results::in_place ? in_place : apart;
    Buffer<T> grad_bias(columns);
    Buffer<float> partials(launch::row_partials(rows) * columns);
    launch::BiasGeluBackward args{};
    args.grad = results == Results::in_place ? in_place.data() : grad.data();
    args.x = x.data();
    args.bias = bias.data();
    args.grad_x = grad_x.data();
    args.activated = results == Results::without_activation ? nullptr : activated.data();
    args.grad_bias = grad_bias.data();
    args.partials = partials.data();
    args.rows = rows;
    args.columns = columns;
    args.grad_stride = results == Results::in_place ? columns : grad.stride();
    args.x_stride = x.stride();
    args.dtype = dtype_of<T>;
    launch::bias_gelu_backward(args, nullptr);

    std::vector<double> slopes, values, sums(size_t(columns), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            const double z = x(r, c) + bias(0, c);
            slopes.push_back(grad(r, c) * gelu_slope(z));
            values.push_back(gelu(z));
            sums[size_t(c)] += slopes.back();
        }
    }
    expect_each(grad_x, slopes, multiple<T>, scale<T>, what);
    if (results != Results::without_activation) {
        expect_each(activated, values, multiple<T>, scale<T>, what + " activated");
    }
    expect_each(grad_bias, sums, multiple<T>, scale<T> * std::sqrt(double(rows)),
                what + " grad_bias");
}

template <class T>
void sums(const Shape& shape) {
    const int64_t rows = shape.rows, columns = shape.columns;
    Random random;
    const Rows<T> x(random, rows, columns, shape.x, 1.0f, 0.25f);
    Buffer<T> out(columns);
    Buffer<float> partials(launch::row_partials(rows) * columns);
    launch::SumRows args{};
    args.x = x.data();
    args.out = out.data();
    args.partials = partials.data();
    args.rows = rows;
    args.columns = columns;
    args.x_stride = x.stride();
    args.dtype = dtype_of<T>;
    launch::sum_rows(args, nullptr);

    std::vector<double> exact(size_t(columns), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) exact[size_t(c)] += x(r, c);
    }
    expect_each(out, exact, multiple<T>, scale<T> * std::sqrt(double(rows)),
                "sum_rows " + name_of_case<T>(shape));
}

// Whole vectors; rows that begin unaligned, columns that don't fill a vector; a part of a block.
const Shape shapes[] = {
    {1, 1, {}, {}},        {3, 33, {}, {}},       {65, 64, {}, {}},    {2, 520, {}, {0, 8}},
    {67, 40, {0, 16}, {}}, {5, 64, {1, 0}, {}},   {5, 64, {0, 3}, {}}, {5, 64, {}, {1, 0}},
    {1, 261, {}, {}},      {200, 24, {}, {0, 3}}, {1100, 5, {}, {}},   {5, 64, {}, {}, {1, 0}},
};

template <class T>
void all_shapes() {
    for (const Shape& shape : shapes) {
        forward<T>(shape);
        backward<T>(shape, Results::all);
        sums<T>(shape);
    }
}

CASE("bias_gelu and sum_rows fp32") { all_shapes<float>(); }
CASE("bias_gelu and sum_rows fp16") { all_shapes<fp16>(); }
CASE("bias_gelu and sum_rows bf16") { all_shapes<bf16>(); }

CASE("bias_gelu_backward without the activation, and in place") {
    for (const Results results : {Results::without_activation, Results::in_place}) {
        backward<float>({65, 32, {}, {}}, results);
        backward<bf16>({66, 72, {}, {}}, results);
        backward<bf16>({7, 31, {}, {}}, results);
    }
}

// Far from zero one branch of gelu is the identity, the other nothing: no NaN between.
CASE("bias_gelu far from zero") {
    const float far[] = {-1e30f, -3e4f, -100.0f, -10.0f, 10.0f, 100.0f, 3e4f, 1e30f};
    Buffer<float> x(8), bias(8, 0.0f), out(8);
    std::vector<double> exact;
    for (int64_t i = 0; i < 8; ++i) {
        x[i] = far[i];
        exact.push_back(far[i] > 0 ? far[i] : 0.0);
    }
    launch::BiasGelu args{};
    args.x = x.data();
    args.bias = bias.data();
    args.out = out.data();
    args.rows = 1;
    args.columns = args.x_stride = 8;
    args.dtype = DType::float32;
    launch::bias_gelu(args, nullptr);
    expect_each(out, exact, 1, 1.0, "gelu");
}

}  // namespace
}  // namespace gpt2fast::simulated
