// Shared by the cases of the kernels over rows: rows that lie apart or unaligned, and comparisons
// that one wrong element fails.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "launch/launch.h"
#include "testing.h"

namespace gpt2fast::simulated {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>  ? DType::float32
                           : std::is_same_v<T, fp16> ? DType::float16
                           : std::is_same_v<T, bf16> ? DType::bfloat16
                                                     : DType::int8;

template <class T>
std::string name_of() {
    constexpr DType dtype = dtype_of<T>;
    return dtype == DType::float32    ? "fp32"
           : dtype == DType::float16  ? "fp16"
           : dtype == DType::bfloat16 ? "bf16"
                                      : "int8";
}

// Where rows lie: `offset` elements behind aligned memory, with `gap` elements between them.
struct Layout {
    int64_t offset = 0, gap = 0;
};

// Random rows. Between them and in front there are NaNs, behind the last there is nothing.
template <class T>
class Rows {
public:
    Rows(Random& random, int64_t rows, int64_t columns, Layout layout = {}, float scale = 1.0f,
         float shift = 0.0f)
        : rows_(rows), columns_(columns), offset_(layout.offset), stride_(columns + layout.gap),
          memory_(layout.offset + (rows - 1) * stride_ + columns) {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) {
                set(r, c, shift + scale * random.normal());
            }
        }
    }

    T* data() { return memory_.data() + offset_; }
    const T* data() const { return memory_.data() + offset_; }
    int64_t stride() const { return stride_; }
    double operator()(int64_t r, int64_t c) const { return to_double(data()[r * stride_ + c]); }
    void set(int64_t r, int64_t c, float value) {
        data()[r * stride_ + c] = device::from_float<T>(value);
    }

    // Their elements, one row behind the other.
    Buffer<T> packed() const {
        Buffer<T> all(rows_ * columns_);
        for (int64_t i = 0; i < all.size(); ++i) {
            all[i] = data()[i / columns_ * stride_ + i % columns_];
        }
        return all;
    }

    // The memory between the rows is unchanged.
    void expect_gaps_untouched(const std::string& what) const {
        for (int64_t i = 0; i < memory_.size(); ++i) {
            const int64_t column = (i - offset_) % stride_;
            if (i < offset_ || column >= columns_) {
                expect_unwritten(to_double(memory_[i]),
                                 what + ": element " + std::to_string(i) + " between the rows");
            }
        }
    }

private:
    int64_t rows_, columns_, offset_, stride_;
    Buffer<T> memory_;
};

// Each element within `multiple` epsilons of its storage, measured by its own size or, where terms
// have canceled, by `scale`.
template <class T>
void expect_each(const Buffer<T>& ours, const std::vector<double>& exact, double multiple,
                 double scale, const std::string& what) {
    expect(ours.size() == int64_t(exact.size()), what + ": sizes differ");
    const auto allowed = [&](int64_t i) {
        return multiple * epsilon<T> * std::max(std::abs(exact[size_t(i)]), scale);
    };
    // The one that is furthest beyond its bound.
    int64_t worst = -1;
    double most = 1;
    for (int64_t i = 0; i < ours.size(); ++i) {
        const double off = std::abs(to_double(ours[i]) - exact[size_t(i)]);
        const double share = off == 0 ? 0 : off / allowed(i);
        if (share <= most) continue;
        worst = i;
        most = std::isnan(share) ? INFINITY : share;
    }
    if (worst < 0) return;
    expect_near(to_double(ours[worst]), exact[size_t(worst)], allowed(worst),
                what + ": element " + std::to_string(worst));
}

}  // namespace gpt2fast::simulated
