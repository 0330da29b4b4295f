// Walking along rows of float32 or bfloat16, a vector at a time, and sums over rows.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

// How much of a vector a step covers: all of it, or the first n elements.
struct Whole {};
struct Part {
    int n;
};

template <typename T>
Vec load(const T* p, Whole) {
    return Vec::load(p);
}
template <typename T>
Vec load(const T* p, Part part) {
    return Vec::load(p, part.n);
}
template <typename T>
void store(Vec x, T* p, Whole) {
    x.store(p);
}
template <typename T>
void store(Vec x, T* p, Part part) {
    x.store(p, part.n);
}
// x with zeros in the elements that the step does not cover.
inline Vec covered(Vec x, Whole) { return x; }
inline Vec covered(Vec x, Part part) {
    float buffer[Vec::width];
    x.store(buffer);
    return Vec::load(buffer, part.n);
}

// Independent sums that hide the latency of an addition.
constexpr int chains = 4;

struct Sum {
    Vec v[chains] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    float total() const { return reduce_add((v[0] + v[1]) + (v[2] + v[3])); }
};

// Calls body(j, step, chain) for every vector of `columns` columns; `chain` is a constant below
// `chains` that differs between neighbors.
template <typename Body>
inline void for_columns(int64_t columns, Body body) {
    using std::integral_constant;
    int64_t j = 0;
    for (; j + chains * Vec::width <= columns; j += chains * Vec::width) {
        body(j, Whole(), integral_constant<int, 0>());
        body(j + Vec::width, Whole(), integral_constant<int, 1>());
        body(j + 2 * Vec::width, Whole(), integral_constant<int, 2>());
        body(j + 3 * Vec::width, Whole(), integral_constant<int, 3>());
    }
    for (; j + Vec::width <= columns; j += Vec::width) {
        body(j, Whole(), integral_constant<int, 0>());
    }
    if (j < columns) body(j, Part{int(columns - j)}, integral_constant<int, 1>());
}

// Calls body with a null pointer to the type that `dtype` names.
template <typename Body>
void with_type(DType dtype, Body body) {
    if (dtype == DType::float32) {
        body(static_cast<float*>(nullptr));
    } else {
        body(static_cast<bfloat16*>(nullptr));
    }
}

// The blocks' sums added up, in their order, for columns [begin, end).
inline void add_blocks(const AddBlocks& args, int64_t begin, int64_t end) {
    with_type(args.dtype, [&](auto* type) {
        auto* out = static_cast<decltype(type)>(args.out) + begin;
        for_columns(end - begin, [&](int64_t j, auto step, auto) {
            Vec sum(0.0f);
            for (int64_t block = 0; block < args.blocks; ++block) {
                sum = sum + load(args.sums + block * args.stride + begin + j, step);
            }
            store(sum, out + j, step);
        });
    });
}

}  // namespace gpt2fast::GPT2FAST_ISA
