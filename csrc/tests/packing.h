// Weight matrices in every format, packed as step.h says, and what they hold in double precision.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/step.h"
#include "testing.h"

namespace testing {

using gpt2fast::Format;
using gpt2fast::panel_columns;

inline const char* name_of(Format format) {
    switch (format) {
        case Format::float32: return "float32";
        case Format::bfloat16: return "bfloat16";
        case Format::int8: return "int8";
        case Format::int4: return "int4";
        case Format::float16: return "float16";
    }
    return "";
}

constexpr Format formats[] = {Format::float32, Format::bfloat16, Format::int8, Format::int4,
                              Format::float16};

inline bool is_quantized(Format format) { return format == Format::int8 || format == Format::int4; }
inline bool is_half(Format format) {
    return format == Format::bfloat16 || format == Format::float16;
}

// Weights of some tenths; of sixteen one is subnormal or zero.
inline gpt2fast::float16 random_float16(Random& random) {
    const int64_t exponent = random.below(16) == 0 ? 0 : 9 + random.below(6);  // biased by 15
    return {uint16_t(random.below(2) << 15 | exponent << 10 | random.below(1024))};
}

// In [2^-5, 2^-4) for four bits, in [2^-10, 2^-9) for eight: weights of some tenths.
inline gpt2fast::float16 random_scale(Random& random, bool coarse) {
    const int exponent = coarse ? 10 : 5;  // biased by 15
    return {uint16_t(exponent << 10 | random.below(1024))};
}

// Integers of a quantized matrix: any, or those of the largest sums, all of one sign.
enum class Integers { any, lowest, highest };

// A matrix (inputs, outputs); element (k, n) is values[k * outputs + n].
struct Matrix {
    Format format;
    int64_t inputs, outputs, group;
    std::vector<double> values;
    std::vector<uint8_t> panels;
    int64_t panel_size;
    Integers integers;

    int64_t padded_inputs() const {
        const int64_t unit = group ? group : is_half(format) ? 2 : 1;
        return (inputs + unit - 1) / unit * unit;
    }

    Matrix(Random& random, Format format, int64_t inputs, int64_t outputs, int64_t group,
           Integers integers = Integers::any)
        : format(format), inputs(inputs), outputs(outputs), group(is_quantized(format) ? group : 0),
          values(static_cast<size_t>(inputs * outputs)), integers(integers) {
        const int64_t bits = format == Format::float32 ? 32
                             : is_half(format)         ? 16
                             : format == Format::int8  ? 8
                                                       : 4;
        const int64_t padded = padded_inputs();
        const int64_t groups = this->group ? padded / this->group : 0;
        panel_size = panel_columns * (padded * bits / 8 + 2 * groups);
        const int64_t count = (outputs + panel_columns - 1) / panel_columns;
        panels.assign(static_cast<size_t>(count * panel_size), 0);
        for (int64_t n = 0; n < count * panel_columns; ++n) {
            uint8_t* panel = panels.data() + n / panel_columns * panel_size;
            const int64_t lane = n % panel_columns;
            if (is_quantized(format)) {
                fill_quantized(random, panel, lane, n, padded);
            } else {
                fill_floats(random, panel, lane, n, padded);
            }
        }
    }

private:
    void fill_floats(Random& random, uint8_t* panel, int64_t lane, int64_t n, int64_t padded) {
        for (int64_t k = 0; k < padded; ++k) {
            const bool there = k < inputs && n < outputs;
            const float x = there ? 0.3f * random.normal() : 0.0f;
            double stored = x;
            if (format == Format::float32) {
                std::memcpy(panel + 4 * (k * panel_columns + lane), &x, 4);
            } else if (format == Format::float16) {
                const gpt2fast::float16 half =
                    there ? random_float16(random) : gpt2fast::float16{0};
                std::memcpy(panel + 2 * (k * panel_columns + lane), &half, 2);
                stored = gpt2fast::to_float(half);
            } else {
                const gpt2fast::bfloat16 narrow = gpt2fast::to_bfloat16(x);
                std::memcpy(panel + 4 * (k / 2 * panel_columns + lane) + 2 * (k % 2), &narrow, 2);
                stored = gpt2fast::to_float(narrow);
            }
            if (there) values[size_t(k * outputs + n)] = stored;
        }
    }

    void fill_quantized(Random& random, uint8_t* panel, int64_t lane, int64_t n, int64_t padded) {
        const bool bytes = format == Format::int8;
        const int64_t group_size = 2 * panel_columns + group * panel_columns / (bytes ? 1 : 2);
        for (int64_t g = 0; g < padded / group; ++g) {
            uint8_t* at = panel + g * group_size;
            const bool there = n < outputs;
            const gpt2fast::float16 scale =
                there ? random_scale(random, !bytes) : gpt2fast::float16{0};
            std::memcpy(at + 2 * lane, &scale, 2);
            uint8_t* words = at + 2 * panel_columns;
            for (int64_t i = 0; i < group; ++i) {
                const int64_t k = g * group + i;
                int64_t q = 0;
                if (there && k < inputs) {
                    q = bytes ? random.below(255) - 127 : random.below(16) - 8;
                    if (integers == Integers::lowest) q = bytes ? -127 : -8;
                    if (integers == Integers::highest) q = bytes ? 127 : 7;
                    values[size_t(k * outputs + n)] = double(gpt2fast::to_float(scale)) * q;
                }
                if (bytes) {
                    words[4 * (i / 4 * panel_columns + lane) + i % 4] = uint8_t(q + 128);
                } else {
                    uint8_t& both = words[4 * (i / 8 * panel_columns + lane) + i % 4];
                    both |= uint8_t(i % 8 < 4 ? q + 8 : (q + 8) << 4);
                }
            }
        }
    }
};

}  // namespace testing
