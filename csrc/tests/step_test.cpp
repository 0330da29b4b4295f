// Whole steps of small random models against double precision: every weight and cache format,
// prompts and single tokens, ragged rows and tables of pages, teams of several sizes.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/read_ahead.h"
#include "cpu/step.h"
#include "cpu/team.h"
#include "packing.h"

using namespace gpt2fast;
using testing::expect_close;
using testing::Matrix;
using testing::Random;

namespace {

constexpr int64_t layers = 2, heads = 3, head_dim = 16, width = heads * head_dim, inner = 100,
                  vocab = 77, positions = 40;
constexpr float eps = 1e-5f;

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

using Memory = std::unique_ptr<uint8_t, Free>;

Memory aligned(int64_t size) {
    const int64_t rounded = (size + 63) / 64 * 64;
    return Memory(static_cast<uint8_t*>(std::aligned_alloc(64, size_t(rounded))));
}

struct Layer {
    std::vector<float> ln_1_weight, ln_1_bias, ln_2_weight, ln_2_bias;
    std::vector<float> qkv_bias, attention_bias, inner_bias, mlp_bias;
    Matrix qkv, attention_out, inner_matrix, mlp_out;

    Layer(Random& random, Format format, int64_t group)
        : ln_1_weight(random.normals(width)), ln_1_bias(random.normals(width)),
          ln_2_weight(random.normals(width)), ln_2_bias(random.normals(width)),
          qkv_bias(random.normals(3 * width)), attention_bias(random.normals(width)),
          inner_bias(random.normals(inner)), mlp_bias(random.normals(width)),
          qkv(random, format, width, 3 * width, group),
          attention_out(random, format, width, width, group),
          inner_matrix(random, format, width, inner, group),
          mlp_out(random, format, inner, width, group) {}
};

struct Model {
    Matrix embedding;
    std::vector<float> wpe, ln_f_weight, ln_f_bias;
    std::vector<Layer> at;

    Model(Random& random, Format format, int64_t group)
        : embedding(random, format, width, vocab, group), wpe(random.normals(positions * width)),
          ln_f_weight(random.normals(width)), ln_f_bias(random.normals(width)) {
        for (int64_t i = 0; i < layers; ++i) at.emplace_back(random, format, group);
    }
};

// The model as one block of memory. Vectors are padded to whole panels.
class Arena {
public:
    explicit Arena(const Model& model) : size_(64), memory_(nullptr) {
        // Twice the same way: to find the size, then to write.
        write(model);
        memory_ = aligned(size_);
        std::memset(memory_.get(), 0, size_t(size_));
        size_ = 64;
        write(model);
    }
    const PackedModel* get() const { return reinterpret_cast<PackedModel*>(memory_.get()); }

private:
    int64_t put(const void* data, int64_t bytes, int64_t room) {
        const int64_t begin = size_;
        size_ += (room + 63) / 64 * 64;
        if (memory_) std::memcpy(memory_.get() + begin, data, size_t(bytes));
        return begin;
    }
    int64_t put(const std::vector<float>& x) {
        const int64_t bytes = 4 * int64_t(x.size());
        return put(x.data(), bytes, (bytes + 127) / 128 * 128);
    }
    PackedMatrix put(const Matrix& w, const std::vector<float>* bias) {
        PackedMatrix out{w.format, w.inputs, w.padded_inputs(), w.outputs,
                         w.group,  0,        w.panel_size,      -1};
        out.data = put(w.panels.data(), int64_t(w.panels.size()), int64_t(w.panels.size()));
        if (bias != nullptr) out.bias = put(*bias);
        return out;
    }
    void write(const Model& model) {
        size_ = (int64_t(sizeof(PackedModel) + layers * sizeof(PackedLayer)) + 63) / 64 * 64;
        PackedModel header{};
        header.magic = packed_magic;
        header.layers = layers;
        header.heads = heads;
        header.head_dim = head_dim;
        header.width = width;
        header.inner_width = inner;
        header.vocab = vocab;
        header.positions = positions;
        header.activation = Activation::gelu_new;
        header.eps = eps;
        header.wpe = put(model.wpe);
        header.ln_f_weight = put(model.ln_f_weight);
        header.ln_f_bias = put(model.ln_f_bias);
        header.embedding = header.projection = put(model.embedding, nullptr);
        std::vector<PackedLayer> table;
        for (const Layer& layer : model.at) {
            PackedLayer packed{};
            packed.ln_1_weight = put(layer.ln_1_weight);
            packed.ln_1_bias = put(layer.ln_1_bias);
            packed.ln_2_weight = put(layer.ln_2_weight);
            packed.ln_2_bias = put(layer.ln_2_bias);
            packed.scale = 1 / std::sqrt(double(head_dim));
            packed.qkv = put(layer.qkv, &layer.qkv_bias);
            packed.attention_out = put(layer.attention_out, &layer.attention_bias);
            packed.inner = put(layer.inner_matrix, &layer.inner_bias);
            packed.mlp_out = put(layer.mlp_out, &layer.mlp_bias);
            table.push_back(packed);
        }
        header.size = size_;
        if (!memory_) return;
        std::memcpy(memory_.get(), &header, sizeof header);
        std::memcpy(memory_.get() + sizeof header, table.data(),
                    table.size() * sizeof(PackedLayer));
    }

    int64_t size_;
    Memory memory_;
};

using Row = std::vector<double>;

Row normalized(const Row& x, const std::vector<float>& weight, const std::vector<float>& bias) {
    double mean = 0, variance = 0;
    for (double value : x) mean += value / double(x.size());
    for (double value : x) variance += (value - mean) * (value - mean) / double(x.size());
    Row out(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
        out[i] = (x[i] - mean) / std::sqrt(variance + eps) * weight[i] + bias[i];
    }
    return out;
}

Row times(const Row& x, const Matrix& w, const std::vector<float>* bias) {
    Row out(size_t(w.outputs));
    for (int64_t n = 0; n < w.outputs; ++n) {
        double sum = bias ? (*bias)[size_t(n)] : 0.0;
        for (int64_t k = 0; k < w.inputs; ++k) {
            sum += x[size_t(k)] * w.values[size_t(k * w.outputs + n)];
        }
        out[size_t(n)] = sum;
    }
    return out;
}

// Logits of every token of one sequence.
std::vector<Row> logits_of(const Model& model, const std::vector<int64_t>& tokens) {
    std::vector<Row> hidden;
    for (size_t t = 0; t < tokens.size(); ++t) {
        Row row(width);
        for (int64_t i = 0; i < width; ++i) {
            row[size_t(i)] = model.embedding.values[size_t(i * vocab + tokens[t])] +
                             model.wpe[t * width + size_t(i)];
        }
        hidden.push_back(row);
    }
    for (const Layer& layer : model.at) {
        std::vector<Row> qkv;
        for (const Row& row : hidden) {
            qkv.push_back(times(normalized(row, layer.ln_1_weight, layer.ln_1_bias), layer.qkv,
                                &layer.qkv_bias));
        }
        for (size_t t = 0; t < hidden.size(); ++t) {
            Row attended(width);
            for (size_t head = 0; head < width; head += head_dim) {
                std::vector<double> weights(t + 1);
                double total = 0;
                for (size_t s = 0; s <= t; ++s) {
                    double score = 0;
                    for (size_t d = head; d < head + head_dim; ++d) {
                        score += qkv[t][d] * qkv[s][width + d];
                    }
                    total += weights[s] = std::exp(score / std::sqrt(double(head_dim)));
                }
                for (size_t s = 0; s <= t; ++s) {
                    for (size_t d = head; d < head + head_dim; ++d) {
                        attended[d] += weights[s] / total * qkv[s][2 * width + d];
                    }
                }
            }
            const Row added = times(attended, layer.attention_out, &layer.attention_bias);
            for (size_t i = 0; i < width; ++i) hidden[t][i] += added[i];
            Row wide = times(normalized(hidden[t], layer.ln_2_weight, layer.ln_2_bias),
                             layer.inner_matrix, &layer.inner_bias);
            for (double& x : wide) {
                x *= 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
            }
            const Row projected = times(wide, layer.mlp_out, &layer.mlp_bias);
            for (size_t i = 0; i < width; ++i) hidden[t][i] += projected[i];
        }
    }
    std::vector<Row> logits;
    for (const Row& row : hidden) {
        logits.push_back(
            times(normalized(row, model.ln_f_weight, model.ln_f_bias), model.embedding, nullptr));
    }
    return logits;
}

// Keys or values of some rows, whatever their dtype.
struct Cache {
    static constexpr int64_t rows = 5, page = 16, row_pages = 3, entries = row_pages * page;
    std::vector<uint8_t> data;
    std::vector<float> scales;
    CacheView view;

    explicit Cache(DType dtype)
        : data(size_t(layers * rows * entries * width) * (dtype == DType::float32    ? 4
                                                          : dtype == DType::bfloat16 ? 2
                                                                                     : 1)),
          scales(dtype == DType::int8 ? size_t(layers * rows * entries * heads) : 0) {
        view = {data.data(), rows * entries * width, entries * width, width, nullptr, 0, 0, 0};
        if (dtype == DType::int8) {
            view.scales = scales.data();
            view.scale_layer_stride = rows * entries * heads;
            view.scale_row_stride = entries * heads;
            view.scale_entry_stride = heads;
        }
    }
};

// The same with each page a row, as pools of pages are.
CacheView in_pages(const Cache& cache) {
    CacheView view = cache.view;
    view.row_stride /= Cache::row_pages;
    view.scale_row_stride /= Cache::row_pages;
    return view;
}

// How steps find entries, and how the tokens of sequences attend that bring several.
struct Way {
    bool paged = false, singly = false;
};

struct Sequence {
    int64_t row;
    std::vector<int64_t> tokens;
    int64_t done = 0;
    std::vector<float> logits;  // of every token so far
};

// One step: sequence i takes its next counts[i] tokens; logits of all are wanted.
void advance(const PackedModel* model, Cache& k_cache, Cache& v_cache, DType dtype,
             std::vector<Sequence>& sequences, const std::vector<int64_t>& counts, int threads,
             Way way = {}) {
    std::vector<int64_t> starts = {0}, rows, lengths, ids, places, outputs, pages;
    const std::unique_ptr<bool[]> singly(new bool[sequences.size()]);
    for (size_t i = 0; i < sequences.size(); ++i) {
        const Sequence& sequence = sequences[i];
        rows.push_back(sequence.row);
        lengths.push_back(sequence.done);
        for (int64_t page = 0; page < Cache::row_pages; ++page) {
            pages.push_back(page * Cache::rows + Cache::rows - 1 - sequence.row);
        }
        pages.push_back(-1);
        singly[i] = sequence.done > 0;
        for (int64_t t = sequence.done; t < sequence.done + counts[i]; ++t) {
            ids.push_back(sequence.tokens[size_t(t)]);
            places.push_back(t);
            outputs.push_back(int64_t(outputs.size()));
        }
        starts.push_back(int64_t(ids.size()));
    }
    StepArgs args{};
    args.model = model;
    args.k_cache = way.paged ? in_pages(k_cache) : k_cache.view;
    args.v_cache = way.paged ? in_pages(v_cache) : v_cache.view;
    args.cache_dtype = dtype;
    args.sequences = int64_t(sequences.size());
    args.starts = starts.data();
    args.rows = way.paged ? nullptr : rows.data();
    if (way.paged) {
        args.pages = pages.data();
        args.pages_stride = Cache::row_pages + 1;
        args.page_size = Cache::page;
    }
    if (way.singly) args.singly = singly.get();
    args.lengths = lengths.data();
    args.tokens = int64_t(ids.size());
    args.token_ids = ids.data();
    args.positions = places.data();
    args.outputs = int64_t(outputs.size());
    args.output_tokens = outputs.data();
    std::vector<float> logits(outputs.size() * vocab);
    args.logits = logits.data();
    const Memory workspace = aligned(kernels().step_workspace(args, threads));
    args.workspace = workspace.get();
    args.read_ahead = threads % 2 == 1 ? 16 << 10 : 0;  // the results are the same
    run_team(threads, [&](Worker& worker) { kernels().step(args, worker); });
    auto next = logits.begin();
    for (size_t i = 0; i < sequences.size(); ++i) {
        const auto end = next + counts[i] * vocab;
        sequences[i].logits.insert(sequences[i].logits.end(), next, end);
        sequences[i].done += counts[i];
        next = end;
    }
}

void steps_are_exact(Format format, int64_t group, DType dtype, int threads, double tolerance,
                     Way way = {}) {
    Random random;
    const Model model(random, format, group);
    const Arena arena(model);
    Cache k_cache(dtype), v_cache(dtype);
    std::vector<Sequence> sequences;
    for (const auto& [row, length] : {std::pair<int64_t, int64_t>{3, 37}, {0, 12}, {4, 5}}) {
        std::vector<int64_t> tokens(static_cast<size_t>(length));
        for (int64_t& token : tokens) token = random.below(vocab);
        sequences.push_back({row, tokens, 0, {}});
    }
    // Prompts of different lengths together, then tokens one by one; a row joins, others leave.
    std::vector<Sequence> late = {sequences.back()};
    sequences.pop_back();
    advance(arena.get(), k_cache, v_cache, dtype, sequences, {34, 7}, threads, way);
    advance(arena.get(), k_cache, v_cache, dtype, sequences, {1, 1}, threads, way);
    sequences.push_back(late[0]);
    advance(arena.get(), k_cache, v_cache, dtype, sequences, {1, 2, 3}, threads, way);
    advance(arena.get(), k_cache, v_cache, dtype, sequences, {1, 1, 1}, threads, way);
    std::vector<Sequence> two = {sequences[1], sequences[2]};
    advance(arena.get(), k_cache, v_cache, dtype, two, {1, 1}, threads, way);
    for (const Sequence& sequence : {sequences[0], two[0], two[1]}) {
        std::vector<double> exact;
        for (const Row& row : logits_of(model, sequence.tokens)) {
            exact.insert(exact.end(), row.begin(), row.end());
        }
        expect_close(sequence.logits, exact, tolerance, "row " + std::to_string(sequence.row));
    }
}

// The distance whose fastest step was the fastest is kept, whatever comes after the trials.
void the_faster_distance_is_kept() {
    for (const int64_t faster : gpt2fast::ReadAhead::distances) {
        gpt2fast::ReadAhead read_ahead;
        int counts[2] = {};
        for (int step = 0; step < 2 * gpt2fast::ReadAhead::trials; ++step) {
            const int64_t distance = read_ahead.distance();
            ++counts[distance != 0];
            const double disturbed = step % 4 == 0 ? 10.0 : 0.0;
            read_ahead.took(distance, (distance == faster ? 1.0 : 1.1) + disturbed);
        }
        testing::expect(counts[0] == counts[1], "one distance was tried more often");
        testing::expect(read_ahead.distance() == faster, "the slower distance was kept");
        read_ahead.took(faster, 100.0);
        testing::expect(read_ahead.distance() == faster, "one slow step changed the choice");
    }
}

// What the parent may use (AMX's tiles), its children may.
[[maybe_unused]] void a_forked_child_computes_the_same(Format format) {
    Random random;
    const Model model(random, format, 32);
    const Arena arena(model);
    std::vector<int64_t> tokens(40);
    for (int64_t& token : tokens) token = random.below(vocab);
    const auto logits = [&] {
        Cache k_cache(DType::bfloat16), v_cache(DType::bfloat16);
        std::vector<Sequence> sequences = {{1, tokens, 0, {}}};
        advance(arena.get(), k_cache, v_cache, DType::bfloat16, sequences, {40}, 2);
        return sequences[0].logits;
    };
    const std::vector<float> ours = logits();
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(60);  // a hang ends here
        _exit(logits() == ours ? 0 : 1);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    testing::expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child's logits differ");
}

double tolerance_of(Format format, DType cache) {
    // Rows are rounded to what the weights' format multiplies with; the model amplifies that.
    const bool exact = format == Format::float32 || format == Format::float16;
    const double weights = exact ? 3e-6 : format == Format::bfloat16 ? 2e-2 : 3e-2;
    const double entries = cache == DType::float32 ? 0 : cache == DType::bfloat16 ? 2e-2 : 3e-2;
    return weights + entries;
}

}  // namespace

int main() {
    testing::need_kernels();
    bool fine = true;
    const std::pair<DType, const char*> caches[] = {
        {DType::float32, "float32"}, {DType::bfloat16, "bfloat16"}, {DType::int8, "int8"}};
    for (Format format : testing::formats) {
        for (const auto& [dtype, cache] : caches) {
            for (int threads : {1, 2, 5}) {
                const std::string name = std::string(testing::name_of(format)) + " weights, " +
                                         cache + " cache, " + std::to_string(threads) + " threads";
                fine &= testing::passes(name.c_str(), [&] {
                    steps_are_exact(format, 32, dtype, threads, tolerance_of(format, dtype));
                });
            }
        }
    }
    for (const auto& [dtype, cache] : caches) {
        for (const Way way : {Way{true, false}, Way{false, true}, Way{true, true}}) {
            const std::string name = std::string(cache) + " cache" +
                                     (way.paged ? " in pages" : "") +
                                     (way.singly ? ", tokens singly" : "");
            fine &= testing::passes(name.c_str(), [&] {
                steps_are_exact(Format::float32, 32, dtype, 2, tolerance_of(Format::float32, dtype),
                                way);
            });
        }
    }
    fine &= testing::passes("read ahead", the_faster_distance_is_kept);
    fine &= testing::passes("groups of 64", [&] {
        steps_are_exact(Format::int4, 64, DType::float32, 2, tolerance_of(Format::int4, {}));
    });
#ifndef THREAD_SANITIZER
    for (Format format : testing::formats) {
        const std::string name = std::string("a forked child, ") + testing::name_of(format);
        fine &= testing::passes(name.c_str(), [&] { a_forked_child_computes_the_same(format); });
    }
#endif
    return fine ? 0 : 1;
}
