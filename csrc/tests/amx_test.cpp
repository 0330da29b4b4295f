// Products on tiles, by the model of AMX and, where the processor has it, by AMX: against double
// precision, against each other, and against the products without tiles.
#include "packing.h"

#include "cpu/prelude.h"
#include GPT2FAST_SIMD
#include "cpu/simd/math.h"

#include "cpu/amx.h"
#include "amx_model.h"
#ifdef GPT2FAST_AMX
#include "cpu/simd/amx.h"
#endif

namespace {

using namespace gpt2fast::GPT2FAST_ISA;
using gpt2fast::Format;
using gpt2fast::PackedMatrix;
using gpt2fast::panel_columns;
using testing::expect;
using testing::expect_close;
using testing::Matrix;
using testing::Random;

// Memory of exactly this size, so that sanitizers see what is read beyond it; as floats, NaN.
std::vector<uint8_t> filled(int64_t bytes) { return std::vector<uint8_t>(size_t(bytes), 0xff); }

// rows (count, inputs) times w, by whole panels: (count, panels * 32). What no row fills is NaN.
template <typename Unit>
std::vector<float> on_tiles(const std::vector<float>& x, int64_t count, const Matrix& w,
                            const PackedMatrix& packed) {
    const int64_t panels = packed.panels(), columns = panels * panel_columns;
    std::vector<uint8_t> memory = filled(TiledRows::size(packed, count));
    const TiledRows rows = tiled_rows(packed, memory.data());
    for (int64_t row = 0; row < count; ++row) {
        pack_tiled_row(x.data() + row * w.inputs, w.inputs, rows, rows.tile(row / tile_rows),
                       int(row % tile_rows));
    }
    std::vector<float> out(size_t(count * columns));
    std::vector<uint8_t> unpacked = filled(TiledPanel::size(packed));
    Unit::configure(tile_config(rows.row_bytes()));
    for (int64_t p = 0; p < panels; ++p) {
        const TiledPanel panel(packed, w.panels.data() + p * w.panel_size, unpacked.data());
        const int64_t tiles = TiledRows::tiles(count);
        for (int64_t tile = 0; tile < tiles; tile += 2) {
            const int pair = int(std::min<int64_t>(2, tiles - tile));
            std::vector<float> sums(size_t(pair * tile_rows * panel_columns));
            multiply_tiled<Unit>(panel, rows, rows.tile(tile), pair, sums.data(), {});
            for (int64_t r = 0; r < pair * tile_rows; ++r) {
                const int64_t row = tile * tile_rows + r;
                if (row >= count) break;
                std::copy_n(sums.data() + r * panel_columns, panel_columns,
                            out.data() + row * columns + p * panel_columns);
            }
        }
    }
    Unit::release();
    return out;
}

// The same by gemm.h, a row at a time.
std::vector<float> without_tiles(const std::vector<float>& x, int64_t count, const Matrix& w,
                                 const PackedMatrix& packed) {
    const int64_t columns = packed.panels() * panel_columns;
    std::vector<float> out(size_t(count * columns));
    std::vector<uint8_t> memory = filled(PackedRows::size(packed, 1));
    const PackedRows rows = packed_rows(packed, memory.data());
    for (int64_t row = 0; row < count; ++row) {
        pack_row(x.data() + row * w.inputs, w.inputs, rows, memory.data(), 1, 0);
        for (int64_t p = 0; p < packed.panels(); ++p) {
            multiply_for(w.format, 1)(w.panels.data() + p * w.panel_size, memory.data(), rows,
                                      out.data() + row * columns + p * panel_columns, {});
        }
    }
    return out;
}

std::vector<double> exact_product(const std::vector<float>& x, int64_t count, const Matrix& w,
                                  int64_t columns) {
    std::vector<double> out(size_t(count * columns));
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t k = 0; k < w.inputs; ++k) {
            const double factor =
                gpt2fast::to_float(gpt2fast::to_bfloat16(x[size_t(row * w.inputs + k)]));
            for (int64_t n = 0; n < w.outputs; ++n) {
                out[size_t(row * columns + n)] += factor * w.values[size_t(k * w.outputs + n)];
            }
        }
    }
    return out;
}

void products_are_exact(Format format, int64_t group) {
    Random random;
    for (int64_t inputs : {1, 31, 32, 64, 100, 194, 321}) {
        const Matrix w(random, format, inputs, 33, group);
        const PackedMatrix packed = {format,  inputs, w.padded_inputs(), w.outputs,
                                     w.group, 0,      w.panel_size,      -1};
        for (int64_t count : {1, 2, 15, 16, 17, 31, 32, 33, 40}) {
            const std::string what =
                std::to_string(count) + " rows of " + std::to_string(inputs) + " inputs";
            std::vector<float> x = random.normals(count * inputs, 2.0f);
            // A row of zeros has no scale.
            if (count > 2) std::fill_n(x.begin() + inputs, inputs, 0.0f);
            const std::vector<float> model = on_tiles<AmxModel>(x, count, w, packed);
            const std::vector<float> other = without_tiles(x, count, w, packed);
            if (format == Format::bfloat16) {
                const int64_t columns = packed.panels() * panel_columns;
                expect_close(model, exact_product(x, count, w, columns), 1e-6, what);
            } else {
                // Held against double precision in kernels_test.cpp.
                expect(model == other, what + ": not the sums of the products without tiles");
            }
#ifdef GPT2FAST_AMX
            expect(on_tiles<Amx>(x, count, w, packed) == model, what + ": AMX is not its model");
#endif
        }
    }
}

// The words of (inputs, columns) bfloat16, two inputs in each: [input / 2][column].
std::vector<uint32_t> words_of(const std::vector<gpt2fast::bfloat16>& x, int64_t inputs,
                               int64_t columns) {
    std::vector<uint32_t> words(size_t((inputs + 1) / 2 * columns));
    for (int64_t k = 0; k < inputs; ++k) {
        for (int64_t c = 0; c < columns; ++c) {
            words[size_t(k / 2 * columns + c)] |= uint32_t(x[size_t(k * columns + c)].bits)
                                                  << (k % 2 * 16);
        }
    }
    return words;
}

std::vector<gpt2fast::bfloat16> narrow_normals(Random& random, int64_t count) {
    std::vector<gpt2fast::bfloat16> out;
    for (float x : random.normals(count)) out.push_back(gpt2fast::to_bfloat16(x));
    return out;
}

template <typename Unit>
void attention_products_are_exact() {
    Random random;
    const auto value = [](const std::vector<gpt2fast::bfloat16>& x, int64_t i) {
        return double(gpt2fast::to_float(x[size_t(i)]));
    };
    Unit::configure(tile_config(tile_bytes));
    for (int count : {1, 2, 3, 4}) {
        for (int steps : {1, 2, 3}) {
            const int64_t dim = 32 * steps, stride = dim + 10, keys = tile_rows * count;
            // The last key ends where the memory does.
            const auto k = narrow_normals(random, (keys - 1) * stride + dim);
            const auto q = narrow_normals(random, dim * panel_columns);
            const std::vector<uint32_t> queries = words_of(q, dim, panel_columns);
            std::vector<float> scores(size_t(keys * panel_columns));
            tiled_scores<Unit>(reinterpret_cast<const uint8_t*>(queries.data()),
                               reinterpret_cast<const uint8_t*>(k.data()), 2 * stride, count, steps,
                               scores.data());
            std::vector<double> exact(scores.size());
            for (int64_t i = 0; i < keys * panel_columns; ++i) {
                for (int64_t d = 0; d < dim; ++d) {
                    exact[size_t(i)] += value(k, i / panel_columns * stride + d) *
                                        value(q, d * panel_columns + i % panel_columns);
                }
            }
            expect_close(scores, exact, 1e-6, "scores of size " + std::to_string(dim));
        }
        for (int64_t entries : {1, 2, 31, 32, 33, 64}) {
            const int64_t columns = tile_rows * count, size = columns + 3;
            const auto v = narrow_normals(random, entries * size);
            const auto p = narrow_normals(random, entries * panel_columns);
            const std::vector<uint32_t> values = words_of(v, entries, size);
            std::vector<uint32_t> weights = words_of(p, entries, panel_columns);
            const int words = int((entries + 1) / 2);
            weights.resize(size_t((words + 15) / 16 * 16 * panel_columns), 0x7fc07fc0u);
            std::vector<float> sums = random.normals(columns * panel_columns);
            std::vector<double> exact(sums.begin(), sums.end());
            for (int64_t i = 0; i < columns * panel_columns; ++i) {
                for (int64_t t = 0; t < entries; ++t) {
                    exact[size_t(i)] += value(v, t * size + i / panel_columns) *
                                        value(p, t * panel_columns + i % panel_columns);
                }
            }
            add_tiled_values<Unit>(weights.data(), values.data(), words, size, count, sums.data());
            expect_close(sums, exact, 1e-6, std::to_string(entries) + " values");
        }
    }
    Unit::release();
}

void wrong_shapes_are_noticed() {
    const auto throws = [](auto run) {
        try {
            run();
        } catch (const std::runtime_error&) {
            return true;
        }
        return false;
    };
    AmxModel::release();
    expect(throws([] { AmxModel::clear<0>(); }), "a tile is used before it is configured");
    TileConfig config = tile_config(32);
    config.rows[6] = 16;
    AmxModel::configure(config);
    expect(throws([] { AmxModel::dot_int8<0, 4, 6>(); }), "32 bytes times 16 words");
    AmxModel::configure(tile_config(32));
    AmxModel::dot_int8<0, 4, 6>();
    AmxModel::release();
}

}  // namespace

bool test_tiles() {
    using testing::passes;
    bool fine = passes("tiles of wrong shapes", wrong_shapes_are_noticed);
    fine &= passes("tiles of bfloat16", [] { products_are_exact(Format::bfloat16, 0); });
    fine &= passes("attention on tiles", attention_products_are_exact<AmxModel>);
#ifdef GPT2FAST_AMX
    fine &= passes("attention on AMX's tiles", attention_products_are_exact<Amx>);
#endif
    for (Format format : {Format::int8, Format::int4}) {
        for (int64_t group : {32, 64}) {
            const std::string name = std::string("tiles of ") + testing::name_of(format) +
                                     ", groups of " + std::to_string(group);
            fine &= passes(name.c_str(), [&] { products_are_exact(format, group); });
        }
    }
    return fine;
}
