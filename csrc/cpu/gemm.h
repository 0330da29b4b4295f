// Products of packed weights with a few rows or many.
//
// Rows are packed as tiles of R rows, in which the words of 4 bytes of the R rows follow each other
// for each unit of inputs. A panel of 32 columns times a tile keeps its sums in registers; the
// weights of a few rows pass through once, in the order in which they lie in memory, and those of
// many, which are near by then, once for each half of the sums if they do not fit.
//
// Words of a row are the weights' own where the processor multiplies those: one float32, two
// bfloat16, four int8. Where it does not, rows are widened when they are packed: bfloat16 to
// float32, and the bytes that meet int8 weights to 16 bits.
//
// Floor of a product with one row: the panel's bytes at the speed of memory. With many rows: the
// multiply-adds, against R broadcasts and 32 / width loads a unit.
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

// How `count` rows are cut into tiles of nearly equal size.
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

// Rounds `count` floats to int8, the largest to 127; returns the factor. Whole vectors are written.
inline float narrow_group(const float* x, int count, int8_t* narrow) {
    Vec largest(0.0f);
    int k = 0;
    for (; k + Vec::width <= count; k += Vec::width) largest = max(largest, abs(Vec::load(x + k)));
    if (k < count) largest = max(largest, abs(Vec::load(x + k, count - k)));
    const float most = reduce_max(largest);
    const Vec inverse(most > 0.0f ? 127.0f / most : 0.0f);
    for (k = 0; k + Vec::width <= count; k += Vec::width) {
        (Vec::load(x + k) * inverse).store(narrow + k);
    }
    if (k < count) (Vec::load(x + k, count - k) * inverse).store(narrow + k);
    return most / 127.0f;
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
        const float scale = narrow_group(x + begin, int(end - begin), narrow);
        int32_t sum = 0;
        for (int i = 0; i < int(to.group); ++i) sum += narrow[i];
        for (int i = 0; i < int(to.group) / 4; ++i) {
            uint32_t* word = words + (begin / 4 + i) * row_words(to.format) * rows + r;
            if (row_words(to.format) == 2) {
                widen_bytes(narrow + 4 * i, word, word + rows);
            } else {
                std::memcpy(word, narrow + 4 * i, 4);
            }
        }
        scales[g * rows + r] = scale;
        corrections[g * rows + r] = -offset * sum;
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

// Prefetches while a panel is at work, for each word of the inputs and each row of scales: `stride`
// bytes at `far`, from memory into the second level of the cache, since the first can wait for few
// lines at a time. Where the panel meets a single tile of rows, too, what is near goes from there
// into the first.
struct Ahead {
    const uint8_t* far = nullptr;  // or null: nothing is prefetched
    int64_t stride = 0;            // 128, or less where the panel meets several tiles
    // With a single tile: where `far` is to go on at `then`, and `near` is to end.
    const uint8_t *far_end = nullptr, *then = nullptr, *near = nullptr, *near_end = nullptr;

    template <int lines = panel_columns * 4 / 64>
    void ask() {
        if (far == nullptr) return;
        __builtin_prefetch(far, 0, 2);
        if (stride < 128) {
            far += stride;
            return;
        }
        if (lines > 1) __builtin_prefetch(far + 64, 0, 2);
        far += 64 * lines;
        if (far >= far_end) {
            far = then;
            far_end = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
        }
        if (near >= near_end) return;
        for (int i = 0; i < lines; ++i) __builtin_prefetch(near + 64 * i, 0, 3);
        near += 64 * lines;
    }

    // For one part of `count` of the panel's columns, which take their turns.
    Ahead of_part(int part, int count, int64_t bytes) const {
        if (far == nullptr || count == 1) return *this;
        if (stride < 128) return {far + bytes / 128 * stride * part / count, stride / count};
        return part == 0 ? *this : Ahead{};
    }
};

constexpr int64_t near_ahead = 4096;  // bytes

// What to prefetch while a panel meets its only tile of rows: what is read `distance` bytes later,
// of the same panels, which end at `end`, or of those that begin at `next`.
inline Ahead read_ahead(const uint8_t* panel, const uint8_t* end, const uint8_t* next,
                        int64_t distance) {
    const int64_t past = distance - (end - panel);
    if (past < 0) return {panel + distance, 128, end, next, panel + near_ahead, end};
    const auto* never = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
    return {next + past, 128, never, nullptr, panel + near_ahead, end};
}

// What to prefetch while tile `index` of several is multiplied: half the next panel, which follows
// this one, for each of the first two.
inline Ahead next_panel(const uint8_t* panel, int64_t panel_size, int64_t index) {
    if (index >= 2) return {};
    return {panel + panel_size + index * (panel_size / 2), 64};
}

// Sums of R rows and C vectors of columns.
template <int R, int C>
struct Sums {
    Vec v[R][C];

    void clear() {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) v[r][c] = Vec(0.0f);
        }
    }
    // From and to rows of a panel's columns.
    void load(const float* from) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) {
                v[r][c] = Vec::load(from + r * panel_columns + c * Vec::width);
            }
        }
    }
    void store(float* out) const {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < C; ++c) v[r][c].store(out + r * panel_columns + c * Vec::width);
        }
    }
};

// Rows of float32 or bfloat16 words anywhere in memory: word k of row r is at
// data + r * row_stride + k * word_stride, in bytes.
struct Strided {
    const uint8_t* data;
    int64_t row_stride, word_stride;
};

// sums += a word of each column times a word of each row.
template <Format format, int R, int C>
inline void add_word(Sums<R, C>& sums, const uint8_t* panel, const Strided& rows) {
    Words w[C];
    for (int c = 0; c < C; ++c) w[c] = Words::load(panel + c * 4 * Vec::width);
    for (int r = 0; r < R; ++r) {
        const Words x = Words::broadcast(rows.data + r * rows.row_stride);
        for (int c = 0; c < C; ++c) {
            if constexpr (format == Format::float32) {
                sums.v[r][c] = dot_float32(sums.v[r][c], w[c], x);
            } else {
                sums.v[r][c] = dot_bfloat16(sums.v[r][c], w[c], x);
            }
        }
    }
}

// sums += panel * rows over `words` words of inputs; rows have the weights' words. A single row has
// two chains of sums, or it would wait for each multiply-add.
template <Format format, int R, int C>
inline void add_floats(Sums<R, C>& sums, const uint8_t* panel, Strided rows, int64_t words,
                       Ahead ahead) {
    const auto next = [&] {
        panel += 4 * panel_columns;
        rows.data += rows.word_stride;
    };
    int64_t k = 0;
    if constexpr (R == 1) {
        Sums<R, C> others;
        others.clear();
        for (; k + 2 <= words; k += 2) {
            ahead.ask();
            add_word<format>(sums, panel, rows);
            next();
            ahead.ask();
            add_word<format>(others, panel, rows);
            next();
        }
        for (int c = 0; c < C; ++c) sums.v[0][c] = sums.v[0][c] + others.v[0][c];
    }
    for (; k < words; ++k) {
        ahead.ask();
        add_word<format>(sums, panel, rows);
        next();
    }
}

// sums += the even or the odd inputs of a word of each column times a float of each row.
template <bool odd, int R, int C>
inline void add_halves(Sums<R, C>& sums, const uint8_t* panel, const float* x) {
    Vec w[C];
    for (int c = 0; c < C; ++c) {
        const Words both = Words::load(panel + c * 4 * Vec::width);
        w[c] = odd ? odd_halves(both) : even_halves(both);
    }
    for (int r = 0; r < R; ++r) {
        const Vec factor(x[r]);
        for (int c = 0; c < C; ++c) sums.v[r][c] = fma(w[c], factor, sums.v[r][c]);
    }
}

// sums += panel * tile for bfloat16 weights and float32 rows; of a single row again in two chains.
template <int R, int C>
inline void add_widened(Sums<R, C>& sums, const uint8_t* panel, const uint8_t* tile, int64_t words,
                        Ahead ahead) {
    const float* x = reinterpret_cast<const float*>(tile);
    Sums<R, C> others;
    if (R == 1) others.clear();
    for (int64_t k = 0; k < words; ++k) {
        ahead.ask();
        add_halves<false>(sums, panel, x);
        add_halves<true>(R == 1 ? others : sums, panel, x + R);
        panel += 4 * panel_columns;
        x += 2 * R;
    }
    if (R == 1) {
        for (int c = 0; c < C; ++c) sums.v[0][c] = sums.v[0][c] + others.v[0][c];
    }
}

// sums += panel * tile for float16 weights and float32 rows; of a single row again in two chains.
template <int R, int C>
inline void add_float16(Sums<R, C>& sums, const float16* w, const float* x, int64_t inputs,
                        Ahead ahead) {
    const auto add = [&](Sums<R, C>& to) {
        Vec wide[C];
        for (int c = 0; c < C; ++c) wide[c] = Vec::load(w + c * Vec::width);
        for (int r = 0; r < R; ++r) {
            const Vec factor(x[r]);
            for (int c = 0; c < C; ++c) to.v[r][c] = fma(wide[c], factor, to.v[r][c]);
        }
        w += panel_columns;
        x += R;
    };
    Sums<R, C> others;
    if (R == 1) others.clear();
    for (int64_t k = 0; k < inputs; k += 2) {
        ahead.ask();
        add(sums);
        add(R == 1 ? others : sums);
    }
    if (R == 1) {
        for (int c = 0; c < C; ++c) sums.v[0][c] = sums.v[0][c] + others.v[0][c];
    }
}

// Calls part(column, ahead) for each part of a panel of so many bytes that is multiplied at once,
// `column` being its first one.
template <Format format, int R, typename Part>
inline void for_parts(const Ahead& ahead, int64_t panel_size, Part part) {
    constexpr int vectors = vectors_at_once(format, R), count = panel_vectors / vectors;
    for (int i = 0; i < count; ++i) {
        part(i * vectors * Vec::width, ahead.of_part(i, count, panel_size));
    }
}

// out (R, 32) = panel * rows over `words` words of inputs; with `add`, out is added to.
template <Format format, int R>
void multiply_floats(const uint8_t* panel, Strided rows, int64_t words, float* out, bool add) {
    for_parts<format, R>({}, 0, [&](int column, Ahead ahead) {
        Sums<R, vectors_at_once(format, R)> sums;
        add ? sums.load(out + column) : sums.clear();
        add_floats<format>(sums, panel + 4 * column, rows, words, ahead);
        sums.store(out + column);
    });
}

// dots += the products of one group's weights and a tile's rows, as integers.
template <Format format, int R, int C>
inline void add_group(IntVec (&dots)[R][C], const uint8_t* panel, const uint8_t* tile, int words,
                      Ahead& ahead) {
    if constexpr (format == Format::int8) {
        for (int k = 0; k < words; ++k) {
            ahead.ask();
            add_bytes(dots, panel, tile);
            panel += 4 * panel_columns;
            tile += 4 * R * row_words(Format::int8);
        }
    } else {
        for (int k = 0; k < words; k += 2 * nibble_words) {
            // Of a single row the low and the high halves are two chains of sums where those are
            // long.
            constexpr bool two_chains = R == 1 && multiplies_bytes;
            NibbleSums sums[R][C], others[R][C];
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) {
                    sums[r][c].begin(dots[r][c]);
                    others[r][c].begin(IntVec(0));
                }
            }
            for (int i = 0; i < nibble_words; ++i) {
                ahead.ask();
                Words low[C], high[C];
                for (int c = 0; c < C; ++c) {
                    const Words both = Words::load(panel + c * 4 * Vec::width);
                    low[c] = low_nibbles(both);
                    high[c] = high_nibbles(both);
                }
                for (int r = 0; r < R; ++r) {
                    const Words x = Words::broadcast(tile + 4 * r);
                    const Words y = Words::broadcast(tile + 4 * (R + r));
                    for (int c = 0; c < C; ++c) {
                        sums[r][c].add(low[c], x);
                        (two_chains ? others : sums)[r][c].add(high[c], y);
                    }
                }
                panel += 4 * panel_columns;
                tile += 8 * R;
            }
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) {
                    dots[r][c] = sums[r][c].end(dots[r][c]);
                    if (two_chains) dots[r][c] = dots[r][c] + others[r][c].end(IntVec(0));
                }
            }
        }
    }
}

// out (R, 32) = panel * tile for int8 and int4. The sums of a group are exact; its two scales are
// applied in float32.
template <Format format, int R>
void multiply_quantized(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows,
                        float* out, Ahead ahead) {
    constexpr int C = vectors_at_once(format, R);
    const int64_t groups = rows.padded_inputs / rows.group;
    const int words = int(rows.group) / 4;
    const int64_t tile_size = 4 * R * row_words(format) * words;
    const int64_t panel_size = panel_columns * (format == Format::int8 ? 4 : 2) * words;
    const uint8_t* after = tile + rows.words() * 4 * R;
    const float* x_scales = reinterpret_cast<const float*>(after);
    const int32_t* corrections = reinterpret_cast<const int32_t*>(after + groups * 4 * R);
    for_parts<format, R>(ahead, groups * panel_size, [&](int column, Ahead asking) {
        const uint8_t* group = panel;
        Sums<R, C> sums;
        sums.clear();
        for (int64_t g = 0; g < groups; ++g) {
            const float16* w_scales = reinterpret_cast<const float16*>(group) + column;
            group += 2 * panel_columns;
            asking.template ask<panel_columns * 2 / 64>();
            IntVec dots[R][C];
            for (int r = 0; r < R; ++r) {
                for (int c = 0; c < C; ++c) dots[r][c] = IntVec(corrections[g * R + r]);
            }
            add_group<format>(dots, group + 4 * column, tile + g * tile_size, words, asking);
            group += panel_size;
            for (int c = 0; c < C; ++c) {
                const Vec scale = Vec::load(w_scales + c * Vec::width);
                for (int r = 0; r < R; ++r) {
                    sums.v[r][c] =
                        fma(dots[r][c].to_float(), scale * Vec(x_scales[g * R + r]), sums.v[r][c]);
                }
            }
        }
        sums.store(out + column);
    });
}

// The same for a packed tile of R rows, whatever its format.
template <Format format, int R>
void multiply(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows, float* out,
              Ahead ahead) {
    if constexpr (is_quantized(format)) {
        multiply_quantized<format, R>(panel, tile, rows, out, ahead);
    } else if constexpr (format == Format::float16) {
        const int64_t panel_size = rows.padded_inputs * 2 * panel_columns;
        for_parts<format, R>(ahead, panel_size, [&](int column, Ahead asking) {
            Sums<R, vectors_at_once(format, R)> sums;
            sums.clear();
            add_float16(sums, reinterpret_cast<const float16*>(panel) + column,
                        reinterpret_cast<const float*>(tile), rows.padded_inputs, asking);
            sums.store(out + column);
        });
    } else {
        const int64_t panel_size = rows.weight_words() * 4 * panel_columns;
        for_parts<format, R>(ahead, panel_size, [&](int column, Ahead asking) {
            Sums<R, vectors_at_once(format, R)> sums;
            sums.clear();
            if constexpr (row_words(format) == 2) {
                add_widened(sums, panel + 4 * column, tile, rows.weight_words(), asking);
            } else {
                add_floats<format>(sums, panel + 4 * column, {tile, 4, 4 * R}, rows.words(),
                                   asking);
            }
            sums.store(out + column);
        });
    }
}

using MultiplyFloats = void (*)(const uint8_t*, Strided, int64_t, float*, bool);
using Multiply = void (*)(const uint8_t*, const uint8_t*, const PackedRows&, float*, Ahead);

// The functions for 1 .. most_rows(format) rows.
template <Format format>
struct ByRows {
    template <int... R>
    static constexpr std::array<MultiplyFloats, sizeof...(R)> floats(
        std::integer_sequence<int, R...>) {
        return {multiply_floats<format, R + 1>...};
    }
    template <int... R>
    static constexpr std::array<Multiply, sizeof...(R)> packed(std::integer_sequence<int, R...>) {
        return {multiply<format, R + 1>...};
    }
    using Counts = std::make_integer_sequence<int, most_rows(format)>;
};

template <Format format>
MultiplyFloats multiply_floats_for(int rows) {
    static constexpr auto table = ByRows<format>::floats(typename ByRows<format>::Counts());
    return table[size_t(rows - 1)];
}

template <Format format>
Multiply multiply_for(int rows) {
    static constexpr auto table = ByRows<format>::packed(typename ByRows<format>::Counts());
    return table[size_t(rows - 1)];
}

inline Multiply multiply_for(Format format, int rows) {
    switch (format) {
        case Format::float32: return multiply_for<Format::float32>(rows);
        case Format::bfloat16: return multiply_for<Format::bfloat16>(rows);
        case Format::float16: return multiply_for<Format::float16>(rows);
        case Format::int8: return multiply_for<Format::int8>(rows);
        default: return multiply_for<Format::int4>(rows);
    }
}

// Row `column` of the transposed matrix, as floats: an embedding.
inline void unpack_column(const PackedMatrix& w, const uint8_t* data, int64_t column, float* out) {
    const uint8_t* panel = data + column / panel_columns * w.panel_size;
    const int64_t lane = column % panel_columns;
    switch (w.format) {
        case Format::float32:
            for (int64_t k = 0; k < w.inputs; ++k) {
                std::memcpy(out + k, panel + 4 * (k * panel_columns + lane), 4);
            }
            return;
        case Format::bfloat16:
            for (int64_t k = 0; k < w.inputs; ++k) {
                bfloat16 x;
                std::memcpy(&x, panel + 4 * (k / 2 * panel_columns + lane) + 2 * (k % 2), 2);
                out[k] = to_float(x);
            }
            return;
        case Format::float16:
            for (int64_t k = 0; k < w.inputs; ++k) {
                float16 x;
                std::memcpy(&x, panel + 2 * (k * panel_columns + lane), 2);
                out[k] = to_float(x);
            }
            return;
        default: break;
    }
    const bool bytes = w.format == Format::int8;
    const int64_t group_size = 2 * panel_columns + w.group * panel_columns / (bytes ? 1 : 2);
    for (int64_t k = 0; k < w.inputs; ++k) {
        const uint8_t* group = panel + k / w.group * group_size;
        const int64_t i = k % w.group;
        float16 scale;
        std::memcpy(&scale, group + 2 * lane, 2);
        const uint8_t* words = group + 2 * panel_columns;
        int q;
        if (bytes) {
            q = words[4 * (i / 4 * panel_columns + lane) + i % 4] - 128;
        } else {
            const uint8_t both = words[4 * (i / 8 * panel_columns + lane) + i % 4];
            q = (i % 8 < 4 ? both & 15 : both >> 4) - 8;
        }
        out[k] = to_float(scale) * float(q);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
