// Products of packed weights with many rows, on tiles: registers of 16 rows of 64 bytes, which AMX
// multiplies 16 x 64 by 64 x 16 bytes at a time.
//
// A panel's words lie as the instructions want their right factor: 16 words of inputs of 16 of its
// columns are a tile, two side by side. Rows are packed as the left factor, 16 to a tile. Two tiles
// of rows times two of columns keep four tiles of sums, so that each tile that is loaded serves two
// products. bfloat16 adds up in float32 within the tiles. The integers of a group are added up
// exactly; the sums then pass through memory to be scaled, as gemm.h does it and in its order: the
// results are the same to the last bit.
//
// Floor: a product of tiles takes 16 cycles, 512 multiply-adds of bfloat16 or 1024 of int8 a cycle.
// Scaling takes three vector instructions for 16 sums, on two ports: 24 cycles for a tile of a
// group. So int8 stays near 64 * 16 * 16 / 24 = 683 a cycle with groups of 64, 341 with groups of
// 32, and less by the loads and stores that do not overlap.
//
// `Unit` executes the instructions: Amx (simd/amx.h), or csrc/tests/amx_model.h.
#pragma once

#include "gemm.h"

namespace gpt2fast::GPT2FAST_ISA {

constexpr int tile_rows = 16, tile_bytes = 64, tile_columns = tile_bytes / 4;

// The layout that ldtilecfg reads.
struct TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];  // of each row
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Tiles 0 .. 3 hold sums, 4 and 5 rows of `row_bytes` bytes, 6 and 7 the weights for them.
constexpr TileConfig tile_config(int row_bytes) {
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.bytes[i] = uint16_t(i == 4 || i == 5 ? row_bytes : tile_bytes);
        config.rows[i] = uint8_t(i < 6 ? tile_rows : row_bytes / 4);
    }
    return config;
}

// Rows packed for tiles: for each step of inputs, `row_bytes()` bytes of each of 16 rows; behind
// the steps of a quantized format the rows' scales, 16 floats a group. A group is a step.
struct TiledRows {
    uint8_t* data;
    Format format;
    int64_t padded_inputs;
    int64_t group;

    int row_bytes() const { return group ? int(group) : tile_bytes; }
    int64_t steps() const {
        const int64_t step = group ? group : tile_bytes / 2;
        return (padded_inputs + step - 1) / step;
    }
    int64_t tile_size() const { return tile_rows * steps() * (row_bytes() + (group ? 4 : 0)); }
    uint8_t* tile(int64_t index) const { return data + index * tile_size(); }
    float* scales(uint8_t* tile) const {
        return reinterpret_cast<float*>(tile + tile_rows * steps() * row_bytes());
    }
    const float* scales(const uint8_t* tile) const {
        return reinterpret_cast<const float*>(tile + tile_rows * steps() * row_bytes());
    }
    static int64_t tiles(int64_t rows) { return (rows + tile_rows - 1) / tile_rows; }
    static int64_t size(const PackedMatrix& w, int64_t rows) {
        return tiles(rows) * TiledRows{nullptr, w.format, w.padded_inputs, w.group}.tile_size();
    }
};

inline TiledRows tiled_rows(const PackedMatrix& w, uint8_t* data) {
    return {data, w.format, w.padded_inputs, w.group};
}

// Writes x, `inputs` floats, as row r of a tile. Rows that a tile lacks are not written: what they
// hold reaches only their own sums.
inline void pack_tiled_row(const float* x, int64_t inputs, const TiledRows& to, uint8_t* tile,
                           int r) {
    const int bytes = to.row_bytes();
    if (to.group == 0) {
        constexpr int step = tile_bytes / 2;
        for (int64_t s = 0; s < to.steps(); ++s) {
            const float* from = x + s * step;
            bfloat16* narrow = reinterpret_cast<bfloat16*>(tile + (s * tile_rows + r) * tile_bytes);
            const int count = int(std::min<int64_t>(step, inputs - s * step));
            int k = 0;
            for (; k + Vec::width <= count; k += Vec::width) Vec::load(from + k).store(narrow + k);
            for (; k < step; ++k) narrow[k] = k < count ? to_bfloat16(from[k]) : bfloat16{0};
        }
        return;
    }
    for (int64_t g = 0; g < to.steps(); ++g) {
        const int64_t begin = g * to.group, end = std::min(begin + to.group, inputs);
        int8_t narrow[64 + Vec::width] = {};
        to.scales(tile)[g * tile_rows + r] =
            narrow_group(x + begin, int(end - begin), narrow).scale;
        std::memcpy(tile + (g * tile_rows + r) * bytes, narrow, size_t(bytes));
    }
}

// A panel as the products below read it: quantized weights as signed bytes, each group behind its
// 32 scales in float32. bfloat16 stays where it is, except for inputs that fill no tile.
class TiledPanel {
public:
    // Bytes of `memory` that the constructor needs.
    static int64_t size(const PackedMatrix& w) {
        if (w.group == 0) return tile_rows * 4 * panel_columns;
        return w.padded_inputs / w.group * group_size(w.group);
    }

    TiledPanel(const PackedMatrix& w, const uint8_t* panel, uint8_t* memory)
        : data_(panel), rest_(memory) {
        if (w.group == 0) {
            const int64_t words = w.padded_inputs / 2, whole = words / tile_rows * tile_rows;
            if (words == whole) return;
            const size_t bytes = size_t(words - whole) * 4 * panel_columns;
            std::memcpy(memory, panel + whole * 4 * panel_columns, bytes);
            std::memset(memory + bytes, 0, tile_rows * 4 * panel_columns - bytes);
        } else {
            data_ = memory;
            unpack(w, panel, memory);
        }
    }

    // Of bfloat16: the words of a step's inputs.
    const uint8_t* step(int64_t index, int64_t whole_steps) const {
        return index < whole_steps ? data_ + index * tile_rows * 4 * panel_columns : rest_;
    }
    // Of quantized formats: a group's scales and words.
    const float* scales(int64_t group, int64_t index) const {
        return reinterpret_cast<const float*>(data_ + index * group_size(group));
    }
    const uint8_t* words(int64_t group, int64_t index) const {
        return data_ + index * group_size(group) + 4 * panel_columns;
    }

private:
    static constexpr int64_t group_size(int64_t group) { return (4 + group) * panel_columns; }

    static void unpack(const PackedMatrix& w, const uint8_t* panel, uint8_t* to) {
        const bool bytes = w.format == Format::int8;
        const int words = int(w.group) / 4 * panel_columns;
        for (int64_t g = 0; g < w.padded_inputs / w.group; ++g) {
            float* scales = reinterpret_cast<float*>(to);
            const float16* narrow = reinterpret_cast<const float16*>(panel);
            for (int c = 0; c < panel_columns; c += Vec::width) {
                Vec::load(narrow + c).store(scales + c);
            }
            const uint32_t* from = reinterpret_cast<const uint32_t*>(narrow + panel_columns);
            uint32_t* out = reinterpret_cast<uint32_t*>(scales + panel_columns);
            if (bytes) {
                for (int i = 0; i < words; ++i) out[i] = from[i] ^ 0x80808080u;
                panel = reinterpret_cast<const uint8_t*>(from + words);
            } else {
                for (int i = 0; i < words / 2; i += panel_columns) {
                    for (int c = 0; c < panel_columns; ++c) {
                        out[2 * i + c] = signed_nibbles(from[i + c]);
                        out[2 * i + panel_columns + c] = signed_nibbles(from[i + c] >> 4);
                    }
                }
                panel = reinterpret_cast<const uint8_t*>(from + words / 2);
            }
            to += group_size(w.group);
        }
    }

    // The low halves q + 8 of four bytes as signed bytes q. No byte borrows from its neighbor.
    static uint32_t signed_nibbles(uint32_t word) {
        return (((word & 0x0f0f0f0fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
    }

    const uint8_t *data_, *rest_;
};

// Where rows lie as tiles load them: bytes from a row to the next, from 16 rows to the next 16, and
// from a step of inputs to the next.
struct RowTiles {
    const uint8_t* data;
    int64_t row_stride, tile_stride, step_stride;
};

// Loads and multiplies one step: R tiles of rows by two of columns.
template <typename Unit, Format format, int R>
inline void multiply_step(const uint8_t* words, const RowTiles& rows, int64_t step) {
    const uint8_t* from = rows.data + step * rows.step_stride;
    Unit::template load<4>(from, rows.row_stride);
    Unit::template load<6>(words, 4 * panel_columns);
    Unit::template load<7>(words + tile_bytes, 4 * panel_columns);
    if constexpr (R == 2) Unit::template load<5>(from + rows.tile_stride, rows.row_stride);
    if constexpr (format == Format::bfloat16) {
        Unit::template dot_bfloat16<0, 4, 6>();
        Unit::template dot_bfloat16<1, 4, 7>();
        if constexpr (R == 2) {
            Unit::template dot_bfloat16<2, 5, 6>();
            Unit::template dot_bfloat16<3, 5, 7>();
        }
    } else {
        Unit::template dot_int8<0, 4, 6>();
        Unit::template dot_int8<1, 4, 7>();
        if constexpr (R == 2) {
            Unit::template dot_int8<2, 5, 6>();
            Unit::template dot_int8<3, 5, 7>();
        }
    }
}

template <typename Unit, int R>
inline void clear_sums() {
    Unit::template clear<0>();
    Unit::template clear<1>();
    if constexpr (R == 2) {
        Unit::template clear<2>();
        Unit::template clear<3>();
    }
}

// Loads sums (16 R, 32) from words of 4 bytes.
template <typename Unit, int R>
inline void load_sums(const void* from) {
    constexpr int64_t stride = 4 * panel_columns;
    const uint8_t* data = static_cast<const uint8_t*>(from);
    Unit::template load<0>(data, stride);
    Unit::template load<1>(data + tile_bytes, stride);
    if constexpr (R == 2) {
        Unit::template load<2>(data + tile_rows * stride, stride);
        Unit::template load<3>(data + tile_rows * stride + tile_bytes, stride);
    }
}

// Stores the sums (16 R, 32) in words of 4 bytes.
template <typename Unit, int R>
inline void store_sums(void* out) {
    constexpr int64_t stride = 4 * panel_columns;
    uint8_t* to = static_cast<uint8_t*>(out);
    Unit::template store<0>(to, stride);
    Unit::template store<1>(to + tile_bytes, stride);
    if constexpr (R == 2) {
        Unit::template store<2>(to + tile_rows * stride, stride);
        Unit::template store<3>(to + tile_rows * stride + tile_bytes, stride);
    }
}

template <typename Unit, int R>
void multiply_tiled_bfloat16(const TiledPanel& panel, const TiledRows& rows, const uint8_t* tile,
                             float* out, Ahead ahead) {
    const int64_t steps = rows.steps(), whole = rows.padded_inputs / 2 / tile_rows;
    const RowTiles from = {tile, tile_bytes, rows.tile_size(), tile_rows * tile_bytes};
    clear_sums<Unit, R>();
    for (int64_t s = 0; s < steps; ++s) {
        for (int i = 0; i < tile_rows; ++i) ahead.ask();
        multiply_step<Unit, Format::bfloat16, R>(panel.step(s, whole), from, s);
    }
    store_sums<Unit, R>(out);
}

template <typename Unit, int R>
void multiply_tiled_groups(const TiledPanel& panel, const TiledRows& rows, const uint8_t* tile,
                           float* out, Ahead ahead) {
    // So many groups' sums are stored before they are scaled: products and vectors overlap.
    constexpr int at_once = 2;
    alignas(64) int32_t sums[at_once][R * tile_rows][panel_columns];
    const int64_t groups = rows.steps(), group = rows.group;
    const RowTiles from = {tile, group, rows.tile_size(), tile_rows * group};
    const float* x_scales = rows.scales(tile);
    const int words = int(group) / (rows.format == Format::int8 ? 4 : 8);  // of a panel
    for (int64_t begin = 0; begin < groups; begin += at_once) {
        const int count = int(std::min<int64_t>(at_once, groups - begin));
        for (int g = 0; g < count; ++g) {
            ahead.ask<panel_columns * 2 / 64>();
            for (int i = 0; i < words; ++i) ahead.ask();
            clear_sums<Unit, R>();
            multiply_step<Unit, Format::int8, R>(panel.words(group, begin + g), from, begin + g);
            store_sums<Unit, R>(sums[g]);
        }
        for (int part = 0; part < R * panel_columns / Vec::width; ++part) {
            const int t = part / (panel_columns / Vec::width);
            const int c = part % (panel_columns / Vec::width) * Vec::width;
            float* to = out + t * tile_rows * panel_columns + c;
            Vec total[tile_rows];
            for (int r = 0; r < tile_rows; ++r) {
                total[r] = begin == 0 ? Vec(0.0f) : Vec::load(to + r * panel_columns);
            }
            for (int g = 0; g < count; ++g) {
                const Vec scale = Vec::load(panel.scales(group, begin + g) + c);
                const float* x = x_scales + t * rows.tile_size() / 4 + (begin + g) * tile_rows;
                for (int r = 0; r < tile_rows; ++r) {
                    total[r] =
                        fma(Vec::load(&sums[g][t * tile_rows + r][c]), scale * Vec(x[r]), total[r]);
                }
            }
            for (int r = 0; r < tile_rows; ++r) total[r].store(to + r * panel_columns);
        }
    }
}

// out (16 count, 32) = panel * one or two tiles of rows. The unit has been configured.
template <typename Unit>
void multiply_tiled(const TiledPanel& panel, const TiledRows& rows, const uint8_t* tile, int count,
                    float* out, Ahead ahead) {
    if (rows.group == 0) {
        (count == 2 ? multiply_tiled_bfloat16<Unit, 2>
                    : multiply_tiled_bfloat16<Unit, 1>)(panel, rows, tile, out, ahead);
    } else {
        (count == 2 ? multiply_tiled_groups<Unit, 2>
                    : multiply_tiled_groups<Unit, 1>)(panel, rows, tile, out, ahead);
    }
}

// out (16 R, 32) = rows times `steps` steps of words; with `add`, out is added to.
template <typename Unit, int R>
void multiply_tiled_steps(const uint8_t* words, const RowTiles& rows, int steps, float* out,
                          bool add) {
    add ? load_sums<Unit, R>(out) : clear_sums<Unit, R>();
    for (int s = 0; s < steps; ++s) {
        multiply_step<Unit, Format::bfloat16, R>(words + s * tile_rows * 4 * panel_columns, rows,
                                                 s);
    }
    store_sums<Unit, R>(out);
}

// The two products of attention (attention.h). The unit is configured for rows of 64 bytes.
//
// scores (16 count, 32) = keys times queries, which are `steps` steps of words. A key of whole
// steps begins every `stride` bytes.
template <typename Unit>
void tiled_scores(const uint8_t* queries, const uint8_t* keys, int64_t stride, int count, int steps,
                  float* scores) {
    for (int tile = 0; tile < count; tile += 2) {
        const auto multiply =
            count - tile > 1 ? multiply_tiled_steps<Unit, 2> : multiply_tiled_steps<Unit, 1>;
        multiply(queries,
                 {keys + tile * tile_rows * stride, stride, tile_rows * stride, tile_bytes}, steps,
                 scores + tile * tile_rows * panel_columns, false);
    }
}

// Words of entries that add_tiled_values takes at most.
constexpr int most_entry_words = 32;

// sums (16 count, 32) += values times weights. Both are `words` words of two entries, of the values
// `size` columns; as left factor these have to be transposed. `weights` has room for whole steps.
template <typename Unit>
void add_tiled_values(uint32_t* weights, const uint32_t* values, int words, int64_t size, int count,
                      float* sums) {
    constexpr int width = std::min(Vec::width, tile_rows);
    const int steps = (words + tile_rows - 1) / tile_rows;
    std::fill(weights + words * panel_columns, weights + steps * tile_rows * panel_columns, 0u);
    alignas(64) float tiles[2][most_entry_words * tile_rows];  // [step][column][word] each
    for (int tile = 0; tile < count; tile += 2) {
        const int pair = std::min(2, count - tile);
        for (int first = 0; first < steps * tile_rows; first += width) {
            for (int column = 0; column < pair * tile_rows; column += width) {
                Vec block[width];
                for (int j = 0; j < width; ++j) {
                    const uint32_t* from = values + (first + j) * size + tile * tile_rows + column;
                    block[j] = first + j < words ? Vec::load(reinterpret_cast<const float*>(from))
                                                 : Vec(0.0f);
                }
                transpose(block);
                float* to = tiles[column / tile_rows] +
                            first / tile_rows * tile_rows * tile_columns +
                            column % tile_rows * tile_columns + first % tile_rows;
                for (int j = 0; j < width; ++j) block[j].store(to + j * tile_columns);
            }
        }
        const auto multiply =
            pair > 1 ? multiply_tiled_steps<Unit, 2> : multiply_tiled_steps<Unit, 1>;
        multiply(reinterpret_cast<const uint8_t*>(weights),
                 {reinterpret_cast<const uint8_t*>(tiles), tile_bytes, int64_t(sizeof tiles[0]),
                  tile_rows * tile_bytes},
                 steps, sums + tile * tile_rows * panel_columns, true);
    }
}

}  // namespace gpt2fast::GPT2FAST_ISA
