// Cases for launch/layer_norm.h.
#include "launch/layer_norm.h"

#include "rows.h"

namespace gpt2fast::simulated {
namespace {

constexpr float eps = 1e-5f;

struct Shape {
    int64_t rows, columns;
    Layout x, residual, grad_summed = {}, weight = {}, bias = {};
};

template <class X, class R, class W>
std::string name_of_case(const Shape& shape) {
    return name_of<X>() + " " + name_of<R>() + " " + name_of<W>() + " " +
           std::to_string(shape.rows) + " x " + std::to_string(shape.columns) + " offset " +
           std::to_string(shape.x.offset) + " gap " + std::to_string(shape.x.gap);
}

double mean_of(const std::vector<double>& values) {
    double sum = 0;
    for (const double value : values) sum += value;
    return sum / double(values.size());
}

double rstd_of(const std::vector<double>& values) {
    const double mean = mean_of(values);
    double square = 0;
    for (const double value : values) square += (value - mean) * (value - mean);
    return 1 / std::sqrt(square / double(values.size()) + eps);
}

template <class X, class R, class W>
void forward(const Shape& shape, bool with_residual) {
    const std::string what = name_of_case<X, R, W>(shape);
    const int64_t rows = shape.rows, columns = shape.columns;
    Random random;
    // Away from zero: a mean or a bias that is forgotten shows.
    const Rows<X> x(random, rows, columns, shape.x, 0.7f, 0.5f);
    const Rows<R> residual(random, rows, columns, shape.residual, 1.0f, -1.25f);
    const Rows<W> weight(random, 1, columns, shape.weight), bias(random, 1, columns, shape.bias);
    Buffer<X> normed(rows * columns);
    Buffer<R> summed(rows * columns);
    Buffer<float> mean(rows), rstd(rows);
    launch::LayerNormForward args{};
    args.x = x.data();
    args.weight = weight.data();
    args.bias = bias.data();
    args.normed = normed.data();
    args.mean = mean.data();
    args.rstd = rstd.data();
    args.rows = rows;
    args.columns = columns;
    args.x_stride = x.stride();
    args.eps = eps;
    args.x_dtype = dtype_of<X>;
    args.residual_dtype = dtype_of<R>;
    args.weight_dtype = dtype_of<W>;
    if (with_residual) {
        args.residual = residual.data();
        args.residual_stride = residual.stride();
        args.summed = summed.data();
    }
    launch::layer_norm_forward(args, nullptr);

    std::vector<double> sums, means, rstds, normals;
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> row;
        for (int64_t c = 0; c < columns; ++c) {
            if (with_residual) {
                sums.push_back(residual(r, c) + x(r, c));
                row.push_back(to_double(summed[r * columns + c]));  // as it is stored
            } else {
                row.push_back(x(r, c));
            }
        }
        means.push_back(mean_of(row));
        rstds.push_back(rstd_of(row));
        for (int64_t c = 0; c < columns; ++c) {
            normals.push_back((row[size_t(c)] - means.back()) * rstds.back() * weight(0, c) +
                              bias(0, c));
        }
    }
    if (with_residual) expect_each(summed, sums, 0.51, 0.0, what + " summed");
    expect_each(mean, means, 8, 1.0, what + " mean");
    expect_each(rstd, rstds, 16, 0.0, what + " rstd");
    // In float32 the sums' errors count, in 16 bits the rounding does.
    const bool wide = std::is_same_v<X, float>;
    expect_each(normed, normals, wide ? 16 : 0.55, wide ? 1.0 : 0x1p-6, what + " normed");
}

template <class G, class R, class W>
void backward(const Shape& shape, bool with_grad_summed) {
    const std::string what = name_of_case<G, R, W>(shape);
    const int64_t rows = shape.rows, columns = shape.columns;
    Random random;
    const Rows<G> grad(random, rows, columns, shape.x, 1.0f, 0.25f);
    const Rows<R> grad_summed(random, rows, columns, shape.grad_summed);
    const Rows<R> summed(random, rows, columns, shape.residual, 1.5f, 0.5f);
    const Rows<W> weight(random, 1, columns, shape.weight);
    Buffer<float> mean(rows), rstd(rows);
    for (int64_t r = 0; r < rows; ++r) {
        std::vector<double> row;
        for (int64_t c = 0; c < columns; ++c) row.push_back(summed(r, c));
        mean[r] = float(mean_of(row));
        rstd[r] = float(rstd_of(row));
    }
    Buffer<R> grad_input(rows * columns);
    Buffer<W> grad_weight(columns), grad_bias(columns);
    Buffer<float> partials(launch::layer_norm_partials(rows) * 2 * columns);
    launch::LayerNormBackward args{};
    args.grad_normed = grad.data();
    args.summed = summed.data();
    args.mean = mean.data();
    args.rstd = rstd.data();
    args.weight = weight.data();
    args.grad_input = grad_input.data();
    args.grad_weight = grad_weight.data();
    args.grad_bias = grad_bias.data();
    args.partials = partials.data();
    args.rows = rows;
    args.columns = columns;
    args.grad_normed_stride = grad.stride();
    args.summed_stride = summed.stride();
    args.grad_dtype = dtype_of<G>;
    args.summed_dtype = dtype_of<R>;
    args.weight_dtype = dtype_of<W>;
    if (with_grad_summed) {
        args.grad_summed = grad_summed.data();
        args.grad_summed_stride = grad_summed.stride();
    }
    launch::layer_norm_backward(args, nullptr);

    std::vector<double> inputs, of_weight(size_t(columns), 0.0), of_bias(size_t(columns), 0.0);
    for (int64_t r = 0; r < rows; ++r) {
        double sum = 0, product = 0;
        const auto standard = [&](int64_t c) {
            return (summed(r, c) - double(mean[r])) * double(rstd[r]);
        };
        for (int64_t c = 0; c < columns; ++c) {
            sum += grad(r, c) * weight(0, c) / double(columns);
            product += grad(r, c) * weight(0, c) * standard(c) / double(columns);
            of_weight[size_t(c)] += grad(r, c) * standard(c);
            of_bias[size_t(c)] += grad(r, c);
        }
        for (int64_t c = 0; c < columns; ++c) {
            const double passed = with_grad_summed ? grad_summed(r, c) : 0.0;
            inputs.push_back(passed + double(rstd[r]) * (grad(r, c) * weight(0, c) - sum -
                                                         standard(c) * product));
        }
    }
    const double sqrt_rows = std::sqrt(double(rows));
    const bool wide_input = std::is_same_v<R, float>, wide = std::is_same_v<W, float>;
    expect_each(grad_input, inputs, wide_input ? 16 : 0.55, wide_input ? 1.0 : 0x1p-6,
                what + " grad_input");
    expect_each(grad_weight, of_weight, wide ? 16 : 0.55, wide ? sqrt_rows : 0x1p-6 * sqrt_rows,
                what + " grad_weight");
    expect_each(grad_bias, of_bias, wide ? 16 : 0.55, wide ? sqrt_rows : 0x1p-6 * sqrt_rows,
                what + " grad_bias");
}

template <class X, class R, class W>
void both(const Shape& shape, bool optional) {
    forward<X, R, W>(shape, optional);
    backward<X, R, W>(shape, optional);
}

// Of all mixtures of storage that there are.
void all_mixtures(const Shape& shape) {
    both<float, float, float>(shape, true);
    both<fp16, fp16, fp16>(shape, true);
    both<bf16, bf16, bf16>(shape, true);
    both<fp16, fp16, float>(shape, true);
    both<bf16, bf16, float>(shape, true);
    both<fp16, float, float>(shape, true);
    both<bf16, float, float>(shape, true);
}

CASE("layer_norm of GPT-2's widths") {
    both<float, float, float>({2, 768, {}, {}}, true);
    both<bf16, bf16, bf16>({9, 768, {}, {}}, true);
    forward<bf16, bf16, bf16>({3, 1600, {}, {}}, true);
    forward<float, float, float>({3, 1280, {}, {}}, true);
}

// The widths choose the kernel: up to 1024, up to 2048, any.
CASE("layer_norm, all mixtures of storage") {
    all_mixtures({3, 72, {}, {}});
    all_mixtures({1, 1032, {}, {}});
    all_mixtures({1, 33, {}, {}});
}

CASE("layer_norm of few and of many rows") {
    both<float, float, float>({1, 4, {}, {}}, true);
    both<bf16, bf16, bf16>({9, 8, {}, {}}, true);
    both<bf16, bf16, bf16>({65, 24, {}, {}}, true);
    both<bf16, bf16, bf16>({3, 1, {}, {}}, true);
    both<float, float, float>({5, 7, {}, {}}, true);
}

CASE("layer_norm of one input, no gradient of the sum") {
    both<float, float, float>({2, 64, {}, {}}, false);
    both<bf16, bf16, bf16>({5, 64, {}, {}}, false);
    both<bf16, bf16, bf16>({3, 33, {}, {}}, false);
    both<bf16, bf16, float>({1, 8, {}, {}}, false);
}

CASE("layer_norm of odd widths") {
    both<fp16, fp16, fp16>({2, 257, {}, {}}, true);
    forward<bf16, bf16, bf16>({1, 2049, {}, {}}, true);
}

CASE("layer_norm of rows that lie apart") {
    both<bf16, bf16, bf16>({5, 64, {0, 16}, {0, 8}, {0, 24}}, true);
    both<float, float, float>({5, 64, {0, 4}, {0, 12}, {0, 8}}, true);
    both<bf16, bf16, bf16>({5, 33, {0, 3}, {0, 7}, {0, 5}}, true);
}

CASE("layer_norm of unaligned rows") {
    both<bf16, bf16, bf16>({3, 64, {1, 0}, {}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {1, 0}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {}, {1, 0}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {}, {}, {1, 0}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {}, {}, {}, {1, 0}}, true);
    both<bf16, bf16, bf16>({3, 64, {0, 1}, {}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {0, 4}}, true);
    both<bf16, bf16, bf16>({3, 64, {}, {}, {0, 4}}, true);
    both<float, float, float>({3, 64, {1, 0}, {2, 0}}, true);
}

CASE("layer_norm refuses other mixtures") {
    launch::LayerNormForward args{};
    args.rows = args.columns = 1;
    args.x_dtype = DType::float32;
    args.residual_dtype = args.weight_dtype = DType::bfloat16;
    expect_error("mixture of dtypes", [&] { launch::layer_norm_forward(args, nullptr); });
    expect(!launch::layer_norm_takes(DType::int8, DType::int8, DType::int8), "takes int8");
}

}  // namespace
}  // namespace gpt2fast::simulated
