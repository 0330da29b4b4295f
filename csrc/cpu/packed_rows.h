// Rows packed for products with packed weights: as tiles of R rows, in which the words of 4 bytes
// of the R rows follow each other for each unit of inputs.
//
// Words of a row are the weights' own where the processor multiplies those: one float32, two
// bfloat16, four int8. Where it does not, rows are widened when they are packed: bfloat16 to
// float32, and the bytes that meet int8 weights to 16 bits.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

constexpr int panel_vectors = panel_columns / Vec::width;

constexpr bool is_quantized(Format format) {
    return format == Format::int8 || format == Format::int4;
}

// The most rows in a tile, by the registers: sums, words of a panel's columns, one of a row.
constexpr int most_rows(Format format) {
    if (Vec::width == 16) {
        if (is_quantized(format)) return 6;
        return format == Format::bfloat16 && !multiplies_bfloat16 ? 12 : 14;
    }
    if (Vec::width == 8) return is_quantized(format) ? 4 : 6;
    return 1;
}

// Vectors of a panel's row that are multiplied at once with a tile of `rows` rows.
constexpr int vectors_at_once(Format format, int rows) {
    return Vec::width == 8 && rows > most_rows(format) / 2 ? panel_vectors / 2 : panel_vectors;
}

// Inputs that share a word of a packed row; float16 weights are multiplied by float32 rows.
constexpr int inputs_per_word(Format format) {
    const bool wide = format == Format::float32 || format == Format::float16;
    return wide ? 1 : format == Format::bfloat16 ? 2 : 4;
}

// Words of 4 bytes that a row has for every so many inputs of a word of the weights.
constexpr int row_words(Format format) {
    const bool widened = (format == Format::bfloat16 && !multiplies_bfloat16) ||
                         (format == Format::int8 && !multiplies_bytes);
    return widened ? 2 : 1;
}

// How `rows` rows are cut into `count` tiles of nearly equal size.
struct Tiles {
    int64_t rows, count;

    Tiles(Format format, int64_t rows)
        : rows(rows), count((rows + most_rows(format) - 1) / most_rows(format)) {}
    int64_t begin(int64_t tile) const { return rows * tile / count; }
    int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

// Packed rows of a matrix: words, and for quantized weights the groups' scales and what the
// weights' offset adds to each sum.
struct PackedRows {
    uint8_t* data;
    Format format;
    int64_t padded_inputs;
    int64_t group;

    // Of a row.
    int64_t words() const { return weight_words() * row_words(format); }
    // Of a column of the weights.
    int64_t weight_words() const { return padded_inputs / inputs_per_word(format); }
    // Bytes of one row.
    int64_t row_size() const { return 4 * words() + (group ? 8 * (padded_inputs / group) : 0); }
    static int64_t size(const PackedMatrix& w, int64_t rows) {
        return rows * PackedRows{nullptr, w.format, w.padded_inputs, w.group}.row_size();
    }
    uint8_t* tile(const Tiles& tiles, int64_t index) const {
        return data + tiles.begin(index) * row_size();
    }
};

inline PackedRows packed_rows(const PackedMatrix& w, uint8_t* data) {
    return {data, w.format, w.padded_inputs, w.group};
}

// The following write x, `inputs` floats, as row r of a tile of `rows` rows.
inline void pack_row_float32(const float* x, int64_t inputs, const PackedRows& to, uint8_t* tile,
                             int rows, int r) {
    float* words = reinterpret_cast<float*>(tile);
    if (rows == 1) {
        std::memcpy(words, x, size_t(inputs) * sizeof(float));
    } else {
        for (int64_t k = 0; k < inputs; ++k) words[k * rows + r] = x[k];
    }
    for (int64_t k = inputs; k < to.padded_inputs; ++k) words[k * rows + r] = 0.0f;
}

inline void pack_row_bfloat16(const float* x, int64_t inputs, const PackedRows& to, uint8_t* tile,
                              int rows, int r) {
    uint32_t* words = reinterpret_cast<uint32_t*>(tile);
    constexpr int step = Vec::width;
    constexpr int count = multiplies_bfloat16 ? step / 2 : step;  // words of a vector
    for (int64_t k = 0; k < to.padded_inputs; k += step) {
        bfloat16 narrow[step] = {};
        if (k + step <= inputs) {
            Vec::load(x + k).store(narrow);
        } else if (k < inputs) {
            Vec::load(x + k, int(inputs - k)).store(narrow);
        }
        uint32_t packed[count];
        if constexpr (multiplies_bfloat16) {
            std::memcpy(packed, narrow, sizeof narrow);
        } else {
            float wide[step];
            Vec::load(narrow).store(wide);
            std::memcpy(packed, wide, sizeof wide);
        }
        const int64_t first = k * count / step;
        const int64_t here = std::min<int64_t>(count, to.words() - first);
        for (int64_t i = 0; i < here; ++i) words[(first + i) * rows + r] = packed[i];
    }
}

// Four bytes as words of two 16-bit numbers: the first and the third, the second and the fourth.
inline void widen_bytes(const int8_t* x, uint32_t* even, uint32_t* odd) {
    *even = uint32_t(uint16_t(x[0])) | uint32_t(uint16_t(x[2])) << 16;
    *odd = uint32_t(uint16_t(x[1])) | uint32_t(uint16_t(x[3])) << 16;
}

// What narrow_group made of its floats: the factor of the bytes, and their sum.
struct NarrowGroup {
    float scale;
    int32_t sum;
};

// Rounds `count` floats to int8, the largest to 127. Whole vectors are written.
inline NarrowGroup narrow_group(const float* x, int count, int8_t* narrow) {
    Vec largest(0.0f);
    int k = 0;
    for (; k + Vec::width <= count; k += Vec::width) largest = max(largest, abs(Vec::load(x + k)));
    if (k < count) largest = max(largest, abs(Vec::load(x + k, count - k)));
    const float most = reduce_max(largest);
    // Of less the inverse would overflow: all are zeros then.
    const Vec inverse(most >= 1e-36f ? 127.0f / most : 0.0f);
    // Summed as floats, which hold such integers exactly: bytes that were just written would have
    // to be waited for.
    Vec sum(0.0f);
    const auto write = [&](Vec values) {
        const Vec rounded = round(values * inverse);
        rounded.store(narrow + k);
        sum = sum + rounded;
    };
    for (k = 0; k + Vec::width <= count; k += Vec::width) write(Vec::load(x + k));
    if (k < count) write(Vec::load(x + k, count - k));
    const float total = reduce_add(sum);
    // Infinity and NaN, which no byte holds, make NaN of the row's products.
    if (!std::isfinite(total)) return {std::numeric_limits<float>::quiet_NaN(), 0};
    return {most / 127.0f, int32_t(total)};
}

inline void pack_row_int8(const float* x, int64_t inputs, const PackedRows& to, uint8_t* tile,
                          int rows, int r) {
    const int offset = (to.format == Format::int8 ? 128 : 8) - dot_offset;
    uint32_t* words = reinterpret_cast<uint32_t*>(tile);
    float* scales = reinterpret_cast<float*>(words + to.words() * rows);
    int32_t* corrections = reinterpret_cast<int32_t*>(scales + to.padded_inputs / to.group * rows);
    for (int64_t g = 0; g * to.group < to.padded_inputs; ++g) {
        const int64_t begin = g * to.group, end = std::min(begin + to.group, inputs);
        int8_t narrow[64 + Vec::width] = {};
        const NarrowGroup made = narrow_group(x + begin, int(end - begin), narrow);
        for (int i = 0; i < int(to.group) / 4; ++i) {
            uint32_t* word = words + (begin / 4 + i) * row_words(to.format) * rows + r;
            if (row_words(to.format) == 2) {
                widen_bytes(narrow + 4 * i, word, word + rows);
            } else {
                std::memcpy(word, narrow + 4 * i, 4);
            }
        }
        scales[g * rows + r] = made.scale;
        corrections[g * rows + r] = -offset * made.sum;
    }
}

inline void pack_row(const float* x, int64_t inputs, const PackedRows& to, uint8_t* tile, int rows,
                     int r) {
    switch (to.format) {
        case Format::float32:
        case Format::float16: return pack_row_float32(x, inputs, to, tile, rows, r);
        case Format::bfloat16: return pack_row_bfloat16(x, inputs, to, tile, rows, r);
        case Format::int8:
        case Format::int4: return pack_row_int8(x, inputs, to, tile, rows, r);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
