// Cases for launch/embedding.h.
#include "launch/embedding.h"

#include <algorithm>
#include <numeric>

#include "rows.h"

namespace gpt2fast::simulated {
namespace {

template <class T>
std::string name_of_case(int64_t count, int64_t columns) {
    return name_of<T>() + " " + std::to_string(count) + " x " + std::to_string(columns);
}

template <class T>
launch::Embedding arguments(const Buffer<int64_t>& tokens, const Buffer<int64_t>& positions,
                            const Rows<T>& wte, int64_t wte_rows, const Rows<T>& wpe,
                            int64_t wpe_rows, Buffer<T>& out) {
    launch::Embedding args{};
    args.tokens = tokens.data();
    args.positions = positions.data();
    args.wte = wte.data();
    args.wpe = wpe.data();
    args.out = out.data();
    args.count = tokens.size();
    args.columns = wte.stride();
    args.wte_rows = wte_rows;
    args.wpe_rows = wpe_rows;
    args.dtype = dtype_of<T>;
    return args;
}

template <class T>
void forward(int64_t count, int64_t columns, Layout of_wte = {}, Layout of_wpe = {}) {
    constexpr int64_t tokens_of = 11, positions_of = 5;
    Random random;
    const Rows<T> wte(random, tokens_of, columns, of_wte);
    const Rows<T> wpe(random, positions_of, columns, of_wpe);
    Buffer<int64_t> tokens = random.below(tokens_of, count);
    Buffer<int64_t> positions = random.below(positions_of, count);
    tokens[count - 1] = tokens_of - 1;
    positions[count - 1] = positions_of - 1;
    Buffer<T> out(count * columns);
    launch::embedding_forward(arguments(tokens, positions, wte, tokens_of, wpe, positions_of, out),
                              nullptr);

    std::vector<double> exact;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < columns; ++c) {
            exact.push_back(wte(tokens[i], c) + wpe(positions[i], c));
        }
    }
    expect_each(out, exact, 0.51, 0.0, "embedding " + name_of_case<T>(count, columns));
}

template <class T>
void backward(const std::vector<int64_t>& indices, int64_t table_rows, int64_t columns,
              Layout layout = {}) {
    const int64_t count = int64_t(indices.size());
    Random random;
    const Rows<T> grad(random, count, columns, layout, 1.0f, 0.25f);
    std::vector<int64_t> by_index(indices.size());
    std::iota(by_index.begin(), by_index.end(), 0);
    std::stable_sort(by_index.begin(), by_index.end(),
                     [&](int64_t a, int64_t b) { return indices[size_t(a)] < indices[size_t(b)]; });
    Buffer<int64_t> sorted(count), order(count);
    for (int64_t i = 0; i < count; ++i) {
        order[i] = by_index[size_t(i)];
        sorted[i] = indices[size_t(order[i])];
    }
    Buffer<T> grad_table(table_rows * columns, device::from_float<T>(0.0f));
    Buffer<float> partials(launch::embedding_partials(count) * columns);
    launch::EmbeddingBackward args{};
    args.grad = grad.data();
    args.sorted = sorted.data();
    args.order = order.data();
    args.grad_table = grad_table.data();
    args.partials = partials.data();
    args.count = count;
    args.columns = columns;
    args.grad_stride = grad.stride();
    args.dtype = dtype_of<T>;
    launch::embedding_backward(args, nullptr);

    std::vector<double> exact(size_t(table_rows * columns), 0.0);
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < columns; ++c) {
            exact[size_t(indices[size_t(i)] * columns + c)] += grad(i, c);
        }
    }
    const bool wide = std::is_same_v<T, float>;
    const double terms = std::sqrt(double(count));
    expect_each(grad_table, exact, wide ? 8 : 0.55, wide ? terms : 0x1p-6 * terms,
                "embedding_backward " + name_of_case<T>(count, columns));
}

// `runs[i]` look-ups of index i, shuffled.
std::vector<int64_t> shuffled_runs(const std::vector<int64_t>& runs) {
    std::vector<int64_t> indices;
    for (size_t i = 0; i < runs.size(); ++i) {
        indices.insert(indices.end(), size_t(runs[i]), int64_t(i));
    }
    Random random;
    for (size_t i = indices.size(); i > 1; --i) {
        std::swap(indices[i - 1], indices[size_t(random.below(int64_t(i)))]);
    }
    return indices;
}

CASE("embedding") {
    forward<float>(17, 768);
    forward<fp16>(9, 64);
    forward<bf16>(65, 48);
    forward<bf16>(3, 2056);
    forward<bf16>(1, 1);
}

CASE("embedding of odd widths and unaligned tables") {
    forward<float>(3, 33);
    forward<fp16>(3, 2049);
    forward<bf16>(3, 7);
    forward<bf16>(3, 64, {1, 0}, {});
    forward<bf16>(3, 64, {}, {1, 0});
}

CASE("embedding refuses indices outside of the tables") {
    for (const int64_t outside : {int64_t(-1), int64_t(4)}) {
        for (const bool token : {true, false}) {
            Random random;
            const Rows<float> wte(random, 4, 8), wpe(random, 4, 8);
            Buffer<int64_t> tokens(2, 1), positions(2, 1);
            (token ? tokens : positions)[1] = outside;
            Buffer<float> out(16);
            const launch::Embedding args = arguments(tokens, positions, wte, 4, wpe, 4, out);
            expect_error("__trap", [&] { launch::embedding_forward(args, nullptr); });
        }
    }
}

// Stretches are of 32 look-ups: runs that end where a stretch does, that cross one border, that
// fill whole stretches; rows of the table that nothing belongs to.
CASE("embedding_backward, runs across stretches") {
    backward<float>(shuffled_runs({32, 32, 0, 31, 2, 1, 30}), 9, 16);
    backward<float>(shuffled_runs({1, 200, 3}), 3, 12);
    backward<float>(shuffled_runs({128}), 1, 4);
    backward<float>(shuffled_runs({0, 33, 64, 95, 1}), 6, 4);
    backward<bf16>(shuffled_runs({5, 97, 0, 0, 64, 1, 31}), 7, 40);
    backward<fp16>(shuffled_runs({40, 3, 70}), 3, 16);
}

CASE("embedding_backward of few look-ups") {
    backward<float>(shuffled_runs({0, 0, 1}), 4, 33);
    backward<bf16>(shuffled_runs({1, 1, 1, 14}), 4, 768);
    backward<bf16>(shuffled_runs({31}), 1, 8);
    backward<bf16>(shuffled_runs({32}), 1, 8);
    backward<bf16>(shuffled_runs({33}), 1, 8);
}

CASE("embedding_backward of odd widths, rows that lie apart, unaligned rows") {
    backward<bf16>(shuffled_runs({20, 50}), 2, 2049);
    backward<bf16>(shuffled_runs({20, 50}), 2, 1);
    backward<bf16>(shuffled_runs({20, 50}), 2, 16, {0, 8});
    backward<bf16>(shuffled_runs({20, 50}), 2, 16, {0, 3});
    backward<float>(shuffled_runs({20, 50}), 2, 16, {1, 0});
    backward<fp16>(shuffled_runs({20, 50}), 2, 5, {0, 3});
}

// As positions are: the same indices over and over.
CASE("embedding_backward of repeated positions") {
    std::vector<int64_t> positions;
    for (int64_t i = 0; i < 40 * 13; ++i) positions.push_back(i % 13);
    backward<bf16>(positions, 16, 24);
}

}  // namespace
}  // namespace gpt2fast::simulated
