// Products of packed weights with a few rows or many.
//
// Rows are packed as the weights are: tiles of R rows, in which the words of 4 bytes of the R rows
// follow each other for each unit of inputs. A panel of 32 columns times a tile keeps its R x 32
// sums in registers; the weights pass through once, in the order in which they lie in memory.
//
// Floor of a product with one row: the panel's bytes at the speed of memory. With many rows: R x 32
// multiply-adds a unit against R broadcasts and 32 / width loads.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

constexpr int panel_vectors = panel_columns / Vec::width;

// The most rows in a tile, by the registers: sums, one word of a panel's column, one of a row. Of
// float16 more than fit beside a whole panel, which passes in parts then (`vectors_at_once`): a
// weight is widened once for all of them.
constexpr int most_rows(Format format) {
    if (format == Format::float16) return Vec::width == 16 ? 14 : Vec::width == 8 ? 6 : 8;
    const bool quantized = format == Format::int8 || format == Format::int4;
    if (Vec::width == 16) return quantized ? 6 : 14;
    if (Vec::width == 8) return quantized ? 2 : 3;
    return 1;
}

// Inputs that share a word of a packed row; float16 weights are multiplied by float32 rows.
constexpr int inputs_per_word(Format format) {
    const bool wide = format == Format::float32 || format == Format::float16;
    return wide ? 1 : format == Format::bfloat16 ? 2 : 4;
}

// How `count` rows are cut into tiles of nearly equal size.
struct Tiles {
    int64_t rows, count;

    Tiles(Format format, int64_t rows)
        : rows(rows), count((rows + most_rows(format) - 1) / most_rows(format)) {}
    int64_t begin(int64_t tile) const { return rows * tile / count; }
    int size(int64_t tile) const { return int(begin(tile + 1) - begin(tile)); }
};

// Packed rows of a matrix: words, and for int8 the groups' scales and what the weights' offset
// adds to each sum.
struct PackedRows {
    uint8_t* data;
    Format format;
    int64_t padded_inputs;
    int64_t group;

    int64_t words() const { return padded_inputs / inputs_per_word(format); }
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
    int64_t k = 0;
    for (; k + step <= inputs; k += step) {
        bfloat16 narrow[step];
        uint32_t pairs[step / 2];
        Vec::load(x + k).store(narrow);
        std::memcpy(pairs, narrow, sizeof narrow);
        for (int i = 0; i < step / 2; ++i) words[(k / 2 + i) * rows + r] = pairs[i];
    }
    for (; k < to.padded_inputs; k += 2) {
        const uint32_t low = k < inputs ? to_bfloat16(x[k]).bits : 0;
        const uint32_t high = k + 1 < inputs ? to_bfloat16(x[k + 1]).bits : 0;
        words[k / 2 * rows + r] = low | high << 16;
    }
}

inline void pack_row_int8(const float* x, int64_t inputs, const PackedRows& to, uint8_t* tile,
                          int rows, int r) {
    const int offset = to.format == Format::int8 ? 128 : 8;
    uint32_t* words = reinterpret_cast<uint32_t*>(tile);
    float* scales = reinterpret_cast<float*>(words + to.words() * rows);
    int32_t* corrections = reinterpret_cast<int32_t*>(scales + to.padded_inputs / to.group * rows);
    for (int64_t g = 0; g * to.group < to.padded_inputs; ++g) {
        const int64_t begin = g * to.group, end = std::min(begin + to.group, inputs);
        Vec largest(0.0f);
        int64_t k = begin;
        for (; k + Vec::width <= end; k += Vec::width)
            largest = max(largest, abs(Vec::load(x + k)));
        if (k < end) largest = max(largest, abs(Vec::load(x + k, int(end - k))));
        const float most = reduce_max(largest);
        const Vec inverse(most > 0.0f ? 127.0f / most : 0.0f);
        int8_t narrow[64 + Vec::width] = {};
        for (k = begin; k + Vec::width <= end; k += Vec::width) {
            (Vec::load(x + k) * inverse).store(narrow + (k - begin));
        }
        if (k < end) (Vec::load(x + k, int(end - k)) * inverse).store(narrow + (k - begin));
        int32_t sum = 0;
        for (int i = 0; i < int(to.group); ++i) sum += narrow[i];
        for (int i = 0; i < int(to.group) / 4; ++i) {
            std::memcpy(words + (begin / 4 + i) * rows + r, narrow + 4 * i, 4);
        }
        scales[g * rows + r] = most / 127.0f;
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

// Prefetches while a panel is at work: two lines at `next`, which then moves on by
// two for each word of the inputs. Into the second level of the cache: the first is full of rows,
// and can wait for few lines at a time.
struct Ahead {
    const uint8_t* next;  // or null

    void ask() {
        if (next == nullptr) return;
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(next + 64, 0, 2);
        next += 2 * panel_columns;
    }
};

// The lines to prefetch while tile `index` of `count` is multiplied; the next panel follows this
// one. While one tile meets panel after panel the processor sees by itself what comes next.
inline Ahead ahead_of(const uint8_t* panel, int64_t panel_size, int64_t index, int64_t count) {
    // Half the next panel each; nothing is left to prefetch for the other tiles.
    if (count > 1 && index < 2) return {panel + panel_size + index * (panel_size / 2)};
    return {nullptr};
}

template <int R>
struct Sums {
    Vec v[R][panel_vectors];

    void clear() {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < panel_vectors; ++c) v[r][c] = Vec(0.0f);
        }
    }
    void load(const float* from) {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < panel_vectors; ++c) {
                v[r][c] = Vec::load(from + r * panel_columns + c * Vec::width);
            }
        }
    }
    void store(float* out) const {
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < panel_vectors; ++c) {
                v[r][c].store(out + r * panel_columns + c * Vec::width);
            }
        }
    }
};

// Rows of float32 or bfloat16 words anywhere in memory: word k of row r is at
// data + r * row_stride + k * word_stride, in bytes.
struct Strided {
    const uint8_t* data;
    int64_t row_stride, word_stride;
};

// sums += panel * rows over `words` words of inputs.
template <Format format, int R>
inline void add_floats(Sums<R>& sums, const uint8_t* panel, Strided rows, int64_t words,
                       Ahead ahead) {
    for (int64_t k = 0; k < words; ++k) {
        ahead.ask();
        Words w[panel_vectors];
        for (int c = 0; c < panel_vectors; ++c) w[c] = Words::load(panel + c * 4 * Vec::width);
        for (int r = 0; r < R; ++r) {
            const Words x = Words::broadcast(rows.data + r * rows.row_stride);
            for (int c = 0; c < panel_vectors; ++c) {
                if constexpr (format == Format::float32) {
                    sums.v[r][c] = dot_float32(sums.v[r][c], w[c], x);
                } else {
                    sums.v[r][c] = dot_bfloat16(sums.v[r][c], w[c], x);
                }
            }
        }
        panel += 4 * panel_columns;
        rows.data += rows.word_stride;
    }
}

// out (R, 32) = panel * rows over `words` words of inputs; with `add`, out is added to.
template <Format format, int R>
void multiply_floats(const uint8_t* panel, Strided rows, int64_t words, float* out, bool add) {
    Sums<R> sums;
    add ? sums.load(out) : sums.clear();
    add_floats<format, R>(sums, panel, rows, words, {nullptr});
    sums.store(out);
}

// Vectors of a float16 panel's columns that `sums` sums each leave room for in the registers.
constexpr int vectors_at_once(int sums) {
    const int fit = Vec::width == 16 ? 28 : Vec::width == 8 ? 12 : 8;
    int vectors = panel_vectors;
    while (vectors * sums > fit) vectors /= 2;
    return vectors;
}

// out (R, 32) = panel * tile for float16, in float32.
template <int R>
void multiply_float16(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows, float* out,
                      Ahead ahead) {
    // The sums of a single row are so few that each waits for itself: odd inputs have their own.
    constexpr int chains = R == 1 ? 2 : 1;
    constexpr int vectors = vectors_at_once(R * chains);
    for (int begin = 0; begin < panel_columns; begin += vectors * Vec::width) {
        const float16* w = reinterpret_cast<const float16*>(panel) + begin;
        const float* x = reinterpret_cast<const float*>(tile);
        Vec sums[chains][R][vectors];
        for (auto& chain : sums) {
            for (auto& row : chain) {
                for (Vec& sum : row) sum = Vec(0.0f);
            }
        }
        for (int64_t k = 0; k < rows.padded_inputs; k += 2) {
            if (begin == 0) ahead.ask();
            for (int i = 0; i < 2; ++i, x += R, w += panel_columns) {
                Vec wide[vectors];
                for (int c = 0; c < vectors; ++c) wide[c] = Vec::load(w + c * Vec::width);
                for (int r = 0; r < R; ++r) {
                    Vec* to = sums[i % chains][r];
                    const Vec value(x[r]);
                    for (int c = 0; c < vectors; ++c) to[c] = fma(wide[c], value, to[c]);
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < vectors; ++c) {
                Vec sum = sums[0][r][c];
                if constexpr (chains == 2) sum = sum + sums[1][r][c];
                sum.store(out + r * panel_columns + begin + c * Vec::width);
            }
        }
    }
}

// out (R, 32) = panel * tile for int8 and int4. The sums of a group are exact; its two scales are
// applied in float32.
template <Format format, int R>
void multiply_quantized(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows,
                        float* out, Ahead ahead) {
    constexpr int vectors = panel_vectors;
    const int64_t groups = rows.padded_inputs / rows.group;
    const int words = int(rows.group) / 4;
    const uint8_t* after = tile + rows.words() * 4 * R;
    const float* x_scales = reinterpret_cast<const float*>(after);
    const int32_t* corrections = reinterpret_cast<const int32_t*>(after + groups * 4 * R);
    Sums<R> sums;
    sums.clear();
    for (int64_t g = 0; g < groups; ++g) {
        const float16* w_scales = reinterpret_cast<const float16*>(panel);
        panel += 2 * panel_columns;
        ahead.ask();
        IntVec dots[R][vectors];
        for (int r = 0; r < R; ++r) {
            for (int c = 0; c < vectors; ++c) dots[r][c] = IntVec(corrections[g * R + r]);
        }
        if constexpr (format == Format::int8) {
            for (int k = 0; k < words; ++k) {
                ahead.ask();
                Words w[vectors];
                for (int c = 0; c < vectors; ++c) w[c] = Words::load(panel + c * 4 * Vec::width);
                for (int r = 0; r < R; ++r) {
                    const Words x = Words::broadcast(tile + 4 * r);
                    for (int c = 0; c < vectors; ++c) dots[r][c] = dot_int8(dots[r][c], w[c], x);
                }
                panel += 4 * panel_columns;
                tile += 4 * R;
            }
        } else {
            for (int k = 0; k < words; k += 2) {
                ahead.ask();
                Words low[vectors], high[vectors];
                for (int c = 0; c < vectors; ++c) {
                    const Words both = Words::load(panel + c * 4 * Vec::width);
                    low[c] = low_nibbles(both);
                    high[c] = high_nibbles(both);
                }
                for (int r = 0; r < R; ++r) {
                    const Words x = Words::broadcast(tile + 4 * r);
                    const Words y = Words::broadcast(tile + 4 * (R + r));
                    for (int c = 0; c < vectors; ++c) {
                        dots[r][c] = dot_int8(dot_int8(dots[r][c], low[c], x), high[c], y);
                    }
                }
                panel += 4 * panel_columns;
                tile += 8 * R;
            }
        }
        for (int c = 0; c < vectors; ++c) {
            const Vec scale = Vec::load(w_scales + c * Vec::width);
            for (int r = 0; r < R; ++r) {
                sums.v[r][c] =
                    fma(dots[r][c].to_float(), scale * Vec(x_scales[g * R + r]), sums.v[r][c]);
            }
        }
    }
    sums.store(out);
}

// The same for a packed tile of R rows, whatever its format.
template <Format format, int R>
void multiply(const uint8_t* panel, const uint8_t* tile, const PackedRows& rows, float* out,
              Ahead ahead) {
    if constexpr (format == Format::float32 || format == Format::bfloat16) {
        Sums<R> sums;
        sums.clear();
        add_floats<format, R>(sums, panel, {tile, 4, 4 * R}, rows.words(), ahead);
        sums.store(out);
    } else if constexpr (format == Format::float16) {
        multiply_float16<R>(panel, tile, rows, out, ahead);
    } else {
        multiply_quantized<format, R>(panel, tile, rows, out, ahead);
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
