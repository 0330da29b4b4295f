// Products of a step's rows with packed weights, by all threads of its team: rows are packed once,
// then panels of the weights pass by blocks of them that stay in a core's own cache.
#pragma once

#include "gemm.h"
#ifdef GPT2FAST_AMX
#include "amx.h"
#include "simd/amx.h"
#endif

namespace gpt2fast::GPT2FAST_ISA {

// Up to so many tokens, every thread normalizes and packs all rows for itself.
constexpr int64_t few_tokens = 2;
// Up to so many tokens, each matrix is read once, by all rows together.
constexpr int64_t single_pass_tokens = 64;
// Bytes of packed rows that stay in a core's own cache while panels pass by.
constexpr int64_t resident_rows = 384 * 1024;
#ifdef GPT2FAST_AMX
// The same on tiles: processors that have them have a second level of 2 MB.
constexpr int64_t resident_tiles = 1024 * 1024;

// Whether a product with `rows` rows is faster on tiles. Measured; integers have to be unpacked.
constexpr bool tiles_pay(Format format, int64_t rows) {
    if (format == Format::float32 || format == Format::float16) return false;
    const int64_t least = format == Format::bfloat16 ? few_tokens + 1
                          : format == Format::int8   ? 32
                                                     : 48;
    return rows >= least;
}
#endif

class RowProducts {
public:
    RowProducts() = default;
    // Rows are packed into `packed`, by all threads together or, where they don't share it, by each
    // for itself; `scratch` is the thread's own.
    RowProducts(const StepArgs& args, Worker& worker, bool shared, uint8_t* packed, float* scratch)
        : model_(args.model), worker_(&worker), read_ahead_(args.read_ahead), shared_(shared),
          packed_(packed), scratch_(scratch) {}

    // Bytes of packed rows for a product with w.
    static int64_t packed_size(const PackedMatrix& w, int64_t rows) {
#ifdef GPT2FAST_AMX
        if (tiles_pay(w.format, rows)) return TiledRows::size(w, rows);
#endif
        return PackedRows::size(w, rows);
    }

    // Floats of scratch for a product with w.
    static int64_t scratch_size([[maybe_unused]] const PackedMatrix& w) {
#ifdef GPT2FAST_AMX
        return TiledPanel::size(w) / 4;
#else
        return 0;
#endif
    }

    // Packs rows for a product with w; `row(i)` is the i-th one's `inputs` floats.
    template <typename Row>
    void pack(const PackedMatrix& w, int64_t rows, Row row) {
#ifdef GPT2FAST_AMX
        if (tiles_pay(w.format, rows)) return pack_tiled(w, rows, row);
#endif
        const PackedRows to = packed_rows(w, packed_);
        const Tiles tiles(w.format, rows);
        for_each(tiles.count, [&](int64_t tile) {
            const int size = tiles.size(tile);
            for (int r = 0; r < size; ++r) {
                pack_row(row(tiles.begin(tile) + r), w.inputs, to, to.tile(tiles, tile), size, r);
            }
        });
    }

    // out (rows, w's outputs) = combine(out, packed rows times w + bias), a vector at a time;
    // `next` is the matrix that follows w.
    template <typename Combine>
    void multiply(const PackedMatrix& w, const PackedMatrix& next, int64_t rows, float* out,
                  Combine combine) {
#ifdef GPT2FAST_AMX
        if (tiles_pay(w.format, rows)) return multiply_tiles(w, next, rows, out, combine);
#endif
        const PackedRows x = packed_rows(w, packed_);
        const Tiles tiles(w.format, rows);
        const uint8_t* data = model_->at(w.data);
        // Few rows: the weights are read once. Many: a block of rows stays in cache, panels stream
        // by.
        int64_t blocks = 1;
        if (rows > single_pass_tokens) {
            const int64_t tile_size = x.row_size() * most_rows(w.format);
            const int64_t room = std::max<int64_t>(1, resident_rows / tile_size);
            blocks = (tiles.count + room - 1) / room;
        }
        const int64_t panels = w.panels();
        if (in_pairs(w, rows)) {
            return worker_->for_each((panels + 1) / 2, [&](int64_t pair) {
                multiply_single(w, next, 2 * pair, x, out, combine);
            });
        }
        worker_->for_each(panels * blocks, [&](int64_t item) {
            const int64_t index = item % panels, block = item / panels;
            const int64_t first = tiles.count * block / blocks;
            const int64_t last = tiles.count * (block + 1) / blocks;
            const uint8_t* panel = data + index * w.panel_size;
            alignas(64) float sums[most_rows(Format::float32) * panel_columns];
            for (int64_t tile = first; tile < last; ++tile) {
                const int size = tiles.size(tile);
                float* to = out + tiles.begin(tile) * w.outputs;
                ask_for_rows(w, index, to, size);
                const Ahead ahead = last - first > 1 ? next_panel(panel, w.panel_size, tile - first)
                                                     : ahead_of(panel, w, next, rows);
                multiply_for(w.format, size)(panel, x.tile(tiles, tile), x, sums, ahead);
                finish_rows(w, index, to, size, sums, combine);
            }
        });
    }

private:
    template <typename Work>
    void for_each(int64_t items, Work work) {
        if (shared_) return worker_->for_each(items, work);
        for (int64_t item = 0; item < items; ++item) work(item);
    }

    // Whether panels are multiplied two at a time.
    static bool in_pairs(const PackedMatrix& w, int64_t rows) {
        return rows == 1 && !is_quantized(w.format);
    }

    // The product of a single row with panel `index` and the one behind it, if there is one.
    template <typename Combine>
    void multiply_single(const PackedMatrix& w, const PackedMatrix& next, int64_t index,
                         const PackedRows& x, float* out, Combine combine) {
        const uint8_t* panel = model_->at(w.data) + index * w.panel_size;
        alignas(64) float sums[2 * panel_columns];
        const bool both = index + 1 < w.panels();
        for (int64_t i = index; i <= index + both; ++i) ask_for_rows(w, i, out, 1);
        if (both) {
            multiply_pair_for(w.format)(panel, x.data, x, sums, ahead_of_pair(panel, w, next, 0),
                                        ahead_of_pair(panel + w.panel_size, w, next, 1));
        } else {
            multiply_for(w.format, 1)(panel, x.data, x, sums, ahead_of(panel, w, next, 1));
        }
        for (int i = 0; i <= both; ++i) {
            finish_rows(w, index + i, out, 1, sums + i * panel_columns, combine);
        }
    }

    // Where this thread's share of the panels begins and ends.
    const uint8_t* share(const PackedMatrix& w, int thread, int64_t rows) const {
        const int64_t unit = in_pairs(w, rows) ? 2 : 1;
        const int64_t items = (w.panels() + unit - 1) / unit;
        const int64_t first = std::min(w.panels(), items * thread / worker_->threads() * unit);
        return model_->at(w.data) + first * w.panel_size;
    }

    // What to prefetch while a panel meets its only tile of rows: of w, and of the matrix after it.
    Ahead ahead_of(const uint8_t* panel, const PackedMatrix& w, const PackedMatrix& next,
                   int64_t rows) const {
        const uint8_t* begin = share(w, worker_->index(), rows);
        const uint8_t* end = share(w, worker_->index() + 1, rows);
        if (read_ahead_ == 0 || panel < begin || panel >= end) return {};
        return read_ahead(panel, end, share(next, worker_->index(), rows), read_ahead_);
    }

    // The same for panel `place` of a pair: the next but one is read after it.
    Ahead ahead_of_pair(const uint8_t* panel, const PackedMatrix& w, const PackedMatrix& next,
                        int place) const {
        const uint8_t* begin = share(w, worker_->index(), 1);
        const uint8_t* end = share(w, worker_->index() + 1, 1);
        if (read_ahead_ == 0 || panel < begin || panel >= end) return {};
        const uint8_t* after = panel + 2 * w.panel_size;
        if (after >= end) after = share(next, worker_->index(), 1) + place * next.panel_size;
        return read_ahead(panel, panel + w.panel_size, after, read_ahead_);
    }

    // Prefetches the place of a panel's results while their sums are computed.
    static void ask_for_rows(const PackedMatrix& w, int64_t panel, const float* out, int rows) {
        for (int r = 0; r < rows; ++r) {
            const float* to = out + r * w.outputs + panel * panel_columns;
            __builtin_prefetch(to, 1);
            __builtin_prefetch(to + panel_columns - 1, 1);
        }
    }

    // Combines a panel's sums (rows, 32) with `out`, which begins with the first of the rows.
    template <typename Combine>
    void finish_rows(const PackedMatrix& w, int64_t panel, float* out, int rows, const float* sums,
                     Combine combine) {
        const float* bias = w.bias < 0 ? nullptr : model_->floats(w.bias);
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < panel_columns; c += Vec::width) {
                const int64_t column = panel * panel_columns + c;
                const int64_t left = w.outputs - column;
                if (left <= 0) break;
                float* to = out + r * w.outputs + column;
                Vec sum = Vec::load(sums + r * panel_columns + c);
                if (left >= Vec::width) {
                    if (bias != nullptr) sum = sum + Vec::load(bias + column);
                    combine(Vec::load(to), sum).store(to);
                } else {
                    const int n = int(left);
                    if (bias != nullptr) sum = sum + Vec::load(bias + column, n);
                    combine(Vec::load(to, n), sum).store(to, n);
                }
            }
        }
    }

#ifdef GPT2FAST_AMX
    template <typename Row>
    void pack_tiled(const PackedMatrix& w, int64_t rows, Row row) {
        const TiledRows to = tiled_rows(w, packed_);
        for_each(rows, [&](int64_t i) {
            pack_tiled_row(row(i), w.inputs, to, to.tile(i / tile_rows), int(i % tile_rows));
        });
    }

    template <typename Combine>
    void multiply_tiles(const PackedMatrix& w, const PackedMatrix& next, int64_t rows, float* out,
                        Combine combine) {
        const TiledRows x = tiled_rows(w, packed_);
        const uint8_t* data = model_->at(w.data);
        const int64_t tiles = TiledRows::tiles(rows), panels = w.panels();
        // Blocks of nearly equal numbers of pairs of tiles.
        const int64_t pairs = (tiles + 1) / 2;
        const int64_t room = std::max<int64_t>(1, resident_tiles / (2 * x.tile_size()));
        const int64_t blocks = (pairs + room - 1) / room;
        Amx::configure(tile_config(x.row_bytes()));
        worker_->for_each(panels * blocks, [&](int64_t item) {
            const int64_t index = item % panels, block = item / panels;
            const uint8_t* from = data + index * w.panel_size;
            const TiledPanel panel(w, from, static_cast<uint8_t*>(static_cast<void*>(scratch_)));
            const int64_t first = pairs * block / blocks, last = pairs * (block + 1) / blocks;
            alignas(64) float sums[2 * tile_rows * panel_columns];
            for (int64_t pair = first; pair < last; ++pair) {
                const int64_t begin = 2 * pair * tile_rows;
                const int size = int(std::min<int64_t>(2 * tile_rows, rows - begin));
                float* to = out + begin * w.outputs;
                ask_for_rows(w, index, to, size);
                const Ahead ahead = last - first > 1 ? next_panel(from, w.panel_size, pair - first)
                                                     : ahead_of(from, w, next, rows);
                multiply_tiled<Amx>(panel, x, x.tile(2 * pair),
                                    int(std::min<int64_t>(2, tiles - 2 * pair)), sums, ahead);
                finish_rows(w, index, to, size, sums, combine);
            }
        });
        Amx::release();
    }
#endif

    const PackedModel* model_ = nullptr;
    Worker* worker_ = nullptr;
    int64_t read_ahead_ = 0;
    bool shared_ = false;
    uint8_t* packed_ = nullptr;
    [[maybe_unused]] float* scratch_ = nullptr;
};

}  // namespace gpt2fast::GPT2FAST_ISA
