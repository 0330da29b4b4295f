// How fast one instruction set's kernels multiply packed weights that lie in the first or second
// level of the cache, or in memory: benchmarks/microkernels.py compiles this, runs it and prints
// the table.
//
//     microkernels THREADS SECONDS
//
// Writes a line for each measurement: format, rows, where the weights are (",ahead": and they are
// prefetched as a decoding step does), GB of weights and billions of multiply-adds a second, all
// threads together, the best of the repetitions.
#include GPT2FAST_KERNELS_FILE

#include "cpu/read_ahead.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace gpt2fast;
using Clock = std::chrono::steady_clock;

constexpr int64_t group = 64;
constexpr size_t huge_page = size_t{2} << 20;

struct Level {
    const char* name;
    int64_t inputs, bytes;  // of a matrix, of all panels of a thread
};

constexpr Level levels[] = {
    {"L1", 64, 12 << 10}, {"L2", 768, 400 << 10}, {"memory", 768, int64_t(96) << 20}};

constexpr int64_t row_counts[] = {1, 2, 8, 64};

PackedMatrix matrix(Format format, int64_t inputs) {
    const bool quantized = format == Format::int8 || format == Format::int4;
    const int64_t bits = format == Format::float32 ? 32
                         : format == Format::int8  ? 8
                         : format == Format::int4  ? 4
                                                   : 16;
    const int64_t scales = quantized ? 2 * (inputs / group) : 0;
    return {format,
            inputs,
            inputs,
            panel_columns,
            quantized ? group : 0,
            0,
            panel_columns * (inputs * bits / 8 + scales),
            -1};
}

const char* name_of(Format format) {
    constexpr const char* names[] = {"float32", "bfloat16", "int8", "int4", "float16"};
    return names[int64_t(format)];
}

// Small numbers in every format: bytes of 0x1c, which as float16 scales and as floats are tiny.
uint8_t* weights(int64_t bytes) {
    const size_t size = (size_t(bytes) / huge_page + 2) * huge_page;
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(huge_page, size));
    if (memory == nullptr) throw std::bad_alloc();
#ifdef __linux__
    madvise(memory, size, MADV_HUGEPAGE);
#endif
    std::memset(memory, 0x1c, size);
    return memory;
}

// Times passes over `panels` panels by all threads at once, for about `seconds`; the best one.
double measure(const PackedMatrix& w, int64_t rows, int64_t panels, int threads, int64_t read_ahead,
               double seconds) {
    std::atomic<int> arrivals{0};
    std::atomic<bool> done{false};
    double best = 1e30;
    const auto run = [&](int index) {
        uint8_t* data = weights(panels * w.panel_size);
        const int64_t bytes = GPT2FAST_ISA::PackedRows::size(w, rows);
        std::vector<float> x(size_t(w.inputs), 0.5f);
        auto* packed = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes + 127) / 64 * 64));
        const GPT2FAST_ISA::Tiles tiles(w.format, rows);
        const GPT2FAST_ISA::PackedRows to = GPT2FAST_ISA::packed_rows(w, packed);
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
            for (int r = 0; r < tiles.size(tile); ++r) {
                GPT2FAST_ISA::pack_row(x.data(), w.inputs, to, to.tile(tiles, tile),
                                       tiles.size(tile), r);
            }
        }
        alignas(64) float sums[16 * panel_columns];
        const Clock::time_point begin = Clock::now();
        const int64_t passes = std::max<int64_t>(1, (1 << 20) / (panels * w.panel_size * rows));
        const uint8_t* end_of_all = data + panels * w.panel_size;
        // What to prefetch beside a panel, of what ends at `until` and goes on at `then`.
        const auto ahead = [&](const uint8_t* at, const uint8_t* until, const uint8_t* then) {
            if (read_ahead == 0) return GPT2FAST_ISA::Ahead{};
            return GPT2FAST_ISA::read_ahead(at, until, then < end_of_all ? then : data, read_ahead);
        };
        int calls = 0;
        const auto meet = [&] {
            const int everybody = ++calls * threads;
            arrivals.fetch_add(1);
            while (arrivals.load() < everybody) {
            }
        };
        while (!done.load()) {
            meet();
            const Clock::time_point start = Clock::now();
            for (int64_t pass = 0; pass < passes; ++pass) {
                // A single row of floats meets two panels at once.
                const bool pairs = rows == 1 && w.group == 0;
                for (int64_t panel = 0; pairs && panel + 1 < panels; panel += 2) {
                    const uint8_t* at = data + panel * w.panel_size;
                    const uint8_t* other = at + w.panel_size;
                    GPT2FAST_ISA::multiply_pair_for(w.format)(
                        at, packed, to, sums, ahead(at, other, at + 2 * w.panel_size),
                        ahead(other, other + w.panel_size, other + 2 * w.panel_size));
                }
                for (int64_t panel = pairs ? panels / 2 * 2 : 0; panel < panels; ++panel) {
                    const uint8_t* at = data + panel * w.panel_size;
                    for (int64_t tile = 0; tile < tiles.count; ++tile) {
                        GPT2FAST_ISA::multiply_for(w.format, tiles.size(tile))(
                            at, to.tile(tiles, tile), to, sums,
                            tiles.count > 1 ? GPT2FAST_ISA::next_panel(at, w.panel_size, tile)
                                            : ahead(at, end_of_all, data));
                    }
                }
            }
            meet();
            const Clock::time_point end = Clock::now();
            if (index == 0) {
                const std::chrono::duration<double> one = end - start, all = end - begin;
                best = std::min(best, one.count() / double(passes));
                if (all.count() > seconds) done.store(true);
            }
            meet();
        }
        std::free(packed);
        std::free(data);
    };
    std::vector<std::thread> others;
    for (int index = 1; index < threads; ++index) others.emplace_back(run, index);
    run(0);
    for (std::thread& other : others) other.join();
    return best;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 3) return 2;
    const int threads = std::atoi(arguments[1]);
    const double seconds = std::atof(arguments[2]);
    for (const Format format :
         {Format::float32, Format::bfloat16, Format::float16, Format::int8, Format::int4}) {
        for (const Level& level : levels) {
            const PackedMatrix w = matrix(format, level.inputs);
            const int64_t panels = std::max<int64_t>(1, level.bytes / w.panel_size);
            for (const int64_t rows : row_counts) {
                for (const int64_t read_ahead : {int64_t(0), ReadAhead::distances[1]}) {
                    // Only a single tile of rows from memory reads ahead.
                    const bool reads = rows == 1 && level.bytes > (int64_t(8) << 20);
                    if (read_ahead > 0 && !reads) continue;
                    const double taken = measure(w, rows, panels, threads, read_ahead, seconds);
                    const double bytes = double(panels * w.panel_size) * threads / taken;
                    const double products =
                        double(panels * panel_columns * w.inputs * rows) * threads / taken;
                    std::printf("%s %d %s%s %.1f %.1f\n", name_of(format), int(rows), level.name,
                                read_ahead > 0 ? ",ahead" : "", bytes / 1e9, products / 1e9);
                    std::fflush(stdout);
                }
            }
        }
    }
    return 0;
}
