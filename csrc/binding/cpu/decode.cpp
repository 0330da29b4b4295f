// Whole steps of a packed model.
#include <chrono>
#include <cstdlib>
#include <memory>

#include "../../cpu/read_ahead.h"
#include "../../cpu/step.h"
#include "sampling.h"

namespace gpt2fast::binding {
namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Aligned memory for a step of the kernels.
std::unique_ptr<void, Free> workspace_of(int64_t bytes, int64_t tokens) {
    std::unique_ptr<void, Free> memory(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
    GPT2FAST_CHECK(memory != nullptr, "no memory for a step of ", tokens, " tokens: ", bytes,
                   " bytes");
    return memory;
}

ReadAheads& read_aheads() {
    static ReadAheads found;
    return found;
}

// Runs the step, then after(worker), on a team.
template <typename After>
void run_step(StepArgs& args, After after) {
    using Clock = std::chrono::steady_clock;
    const int team = threads();
    const auto workspace = workspace_of(kernels().step_workspace(args, team), args.tokens);
    args.workspace = static_cast<uint8_t*>(workspace.get());
    constexpr int64_t most = 16;  // of more tokens a panel meets several tiles
    const ReadAheads::Kind kind(args.tokens, args.model->size, team);
    if (args.tokens <= most) args.read_ahead = read_aheads().distance(kind);
    const Clock::time_point begin = Clock::now();
    run_team(team, [&](Worker& worker) {
        kernels().step(args, worker);
        after(worker);
    });
    const std::chrono::duration<double> taken = Clock::now() - begin;
    if (args.tokens <= most) read_aheads().took(kind, args.read_ahead, taken.count());
}

// Checks that offsets and sizes in the header of an arena lie inside it.
class ArenaBounds {
public:
    ArenaBounds(const PackedModel& model) : model_(model) {}

    void check() const {
        constexpr int64_t most = int64_t(1) << 40;  // products of two stay below 2^63 / 2^panel
        for (const int64_t size : {model_.layers, model_.heads, model_.head_dim, model_.width,
                                   model_.inner_width, model_.vocab, model_.positions}) {
            require(size > 0 && size < (most >> 10));
        }
        require(model_.layers <=
                (model_.size - int64_t(sizeof model_)) / int64_t(sizeof(PackedLayer)));
        require(model_.heads * model_.head_dim == model_.width);
        require(uint64_t(model_.activation) <= uint64_t(Activation::tanh));
        floats(model_.wpe, model_.positions * model_.width);
        floats(model_.ln_f_weight, model_.width);
        floats(model_.ln_f_bias, model_.width);
        matrix(model_.embedding, model_.width, model_.vocab, false);
        matrix(model_.projection, model_.width, model_.vocab, false);
        for (int64_t i = 0; i < model_.layers; ++i) {
            const PackedLayer& layer = model_.layer(i);
            for (const int64_t at :
                 {layer.ln_1_weight, layer.ln_1_bias, layer.ln_2_weight, layer.ln_2_bias}) {
                floats(at, model_.width);
            }
            matrix(layer.qkv, model_.width, 3 * model_.width, true);
            matrix(layer.attention_out, model_.width, model_.width, true);
            matrix(layer.inner, model_.width, model_.inner_width, true);
            matrix(layer.mlp_out, model_.inner_width, model_.width, true);
        }
    }

private:
    static void require(bool holds) {
        GPT2FAST_CHECK(holds, "these packed weights are damaged: their header contradicts itself");
    }
    void inside(int64_t at, int64_t bytes) const {
        require(at >= 0 && bytes >= 0 && at <= model_.size && bytes <= model_.size - at);
    }
    void floats(int64_t at, int64_t count) const {
        require(at % 64 == 0);
        // Read in whole panels.
        inside(at, 4 * panel_columns * ceil_div(count, panel_columns));
    }
    void matrix(const PackedMatrix& w, int64_t inputs, int64_t outputs, bool has_bias) const {
        require(w.inputs == inputs && w.outputs == outputs && w.data % 64 == 0);
        const bool quantized = w.format == Format::int8 || w.format == Format::int4;
        const bool halves = w.format == Format::bfloat16 || w.format == Format::float16;
        require(quantized || halves || w.format == Format::float32);
        require(quantized ? w.group == 32 || w.group == 64 : w.group == 0);
        const int64_t unit = quantized ? w.group : halves ? 2 : 1;
        require(w.padded_inputs == ceil_div(inputs, unit) * unit);
        const int64_t bits = w.format == Format::float32 ? 32
                             : halves                    ? 16
                             : w.format == Format::int8  ? 8
                                                         : 4;
        const int64_t scales = quantized ? 2 * (w.padded_inputs / w.group) : 0;
        require(w.panel_size == panel_columns * (w.padded_inputs * bits / 8 + scales));
        require(w.panels() <= model_.size / w.panel_size);
        inside(w.data, w.panels() * w.panel_size);
        if (has_bias) {
            floats(w.bias, outputs);
        } else {
            require(w.bias == -1);
        }
    }

    const PackedModel& model_;
};

// An expanded tensor has elements that share memory; a tensor that is written must have none.
void check_no_overlap(const Tensor& x, const char* name) {
    for (int64_t dim = 0; dim < x.dim(); ++dim) {
        GPT2FAST_CHECK(x.size(dim) <= 1 || x.stride(dim) > 0, name,
                       " is written in place, and several of its elements share one place in "
                       "memory: it was expanded; clone it first");
    }
}

CacheView view(const Tensor& cache, const std::optional<Tensor>& scales) {
    CacheView out{cache.mutable_data_ptr(),
                  cache.stride(0),
                  cache.stride(1),
                  cache.stride(2),
                  nullptr,
                  0,
                  0,
                  0};
    if (scales) {
        out.scales = floats_of(*scales);
        out.scale_layer_stride = scales->stride(0);
        out.scale_row_stride = scales->stride(1);
        out.scale_entry_stride = scales->stride(2);
    }
    return out;
}

// A contiguous int64 vector whose values lie in [low, high].
const int64_t* integers(const Tensor& x, const char* name, int64_t size, int64_t low,
                        int64_t high) {
    GPT2FAST_CHECK(x.is_contiguous(), name, " must be contiguous");
    std::vector<int64_t> copy;  // of a single element, which may have any stride
    checked(x, name, size, low, high, copy);
    return static_cast<const int64_t*>(x.const_data_ptr());
}

// The arguments of a step that do not depend on its tokens.
StepArgs step_args(const Tensor& arena, const Tensor& k_cache, const Tensor& v_cache,
                   const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales) {
    check_contiguous(arena, "the arena", {-1});
    check_type(arena, "the arena", ScalarType::Byte, "uint8");
    const auto* model = static_cast<const PackedModel*>(arena.const_data_ptr());
    GPT2FAST_CHECK(reinterpret_cast<uintptr_t>(model) % 16 == 0,
                   "packed weights must begin at an address that 16 divides; clone them");
    GPT2FAST_CHECK(arena.numel() >= int64_t(sizeof *model) && model->magic == packed_magic &&
                       model->size == arena.numel(),
                   "these are not packed weights");
    ArenaBounds(*model).check();
    for (const auto& [cache, name] :
         {std::pair(&k_cache, "k_cache"), std::pair(&v_cache, "v_cache")}) {
        check_on_cpu(*cache, name);
        check_stored(*cache, name);
        check_no_overlap(*cache, name);
        GPT2FAST_CHECK(cache->dim() == 5 && cache->size(0) == model->layers &&
                           cache->size(3) == model->heads && cache->size(4) == model->head_dim &&
                           cache->stride(4) == 1 && cache->stride(3) == model->head_dim,
                       "caches must be (", model->layers, ", rows, entries, ", model->heads, ", ",
                       model->head_dim, "), the last two contiguous");
        GPT2FAST_CHECK(cache->size(1) == k_cache.size(1) && cache->size(2) == k_cache.size(2),
                       "both caches must have as many rows and entries");
    }
    for (const auto* scales : {&k_scales, &v_scales}) {
        if (!*scales) continue;
        check_on_cpu(**scales, "scales");
        check_stored(**scales, "scales");
        check_no_overlap(**scales, "scales");
        GPT2FAST_CHECK((*scales)->scalar_type() == ScalarType::Float && (*scales)->dim() == 4 &&
                           (*scales)->size(0) == model->layers &&
                           (*scales)->size(1) == k_cache.size(1) &&
                           (*scales)->size(2) == k_cache.size(2) &&
                           (*scales)->size(3) == model->heads && (*scales)->stride(3) == 1,
                       "scales must be float32 (", model->layers, ", ", k_cache.size(1), ", ",
                       k_cache.size(2), ", ", model->heads, "), the last contiguous");
    }
    GPT2FAST_CHECK((dtype_of(k_cache) == DType::int8) == k_scales.has_value() &&
                       k_scales.has_value() == v_scales.has_value() &&
                       v_cache.scalar_type() == k_cache.scalar_type(),
                   "int8 caches, and only they, come with scales");
    StepArgs args{};
    args.model = model;
    args.k_cache = view(k_cache, k_scales);
    args.v_cache = view(v_cache, v_scales);
    args.cache_dtype = dtype_of(k_cache);
    GPT2FAST_CHECK(args.cache_dtype != DType::bfloat16 || model->head_dim % 2 == 0,
                   "bfloat16 entries are read in pairs, and the heads have size ", model->head_dim);
    return args;
}

void check_room(const StepArgs& args, int64_t rows, int64_t entries) {
    std::vector<bool> taken(static_cast<size_t>(rows));
    for (int64_t i = 0; i < args.sequences; ++i) {
        const int64_t count = args.starts[i + 1] - args.starts[i];
        GPT2FAST_CHECK(count > 0, "starts must rise: sequence ", i, " has ", count, " tokens");
        GPT2FAST_CHECK(args.lengths[i] + count <= entries, "sequence ", i, " holds ",
                       args.lengths[i], " of at most ", entries, " entries; ", count,
                       " more do not fit");
        if (args.pages != nullptr) continue;
        GPT2FAST_CHECK(!taken[size_t(args.rows[i])], "row ", args.rows[i], " is there twice");
        taken[size_t(args.rows[i])] = true;
    }
}

// Reads a table of the pages of `count` that sequences have; it needs those of all its entries, and
// what it writes belongs to one sequence.
void read_pages(StepArgs& args, const Tensor& pages, int64_t count, int64_t page_size) {
    check_on_cpu(pages, "pages");
    check_contiguous(pages, "pages", {args.sequences, -1});
    check_integers(pages, "pages");
    GPT2FAST_CHECK(page_size > 0 && page_size % 16 == 0, "pages have ", page_size,
                   " entries; their size must be a multiple of 16");
    args.pages = static_cast<const int64_t*>(pages.const_data_ptr());
    args.pages_stride = pages.size(1);
    args.page_size = page_size;
    for (int64_t i = 0; i < pages.numel(); ++i) {
        GPT2FAST_CHECK(args.pages[i] >= -1 && args.pages[i] < count, "pages holds ", args.pages[i],
                       ", which is not in -1 .. ", count - 1);
    }
}

void check_pages(const StepArgs& args, int64_t count) {
    std::vector<int64_t> holders(static_cast<size_t>(count));  // of each page in use
    const auto for_pages = [&](auto from, auto visit) {
        for (int64_t i = 0; i < args.sequences; ++i) {
            const int64_t end = args.lengths[i] + args.starts[i + 1] - args.starts[i];
            for (int64_t p = from(i); p < ceil_div(end, args.page_size); ++p) {
                visit(i, args.pages[i * args.pages_stride + p]);
            }
        }
    };
    for_pages([](int64_t) { return int64_t(0); },
              [&](int64_t i, int64_t page) {
                  GPT2FAST_CHECK(page >= 0, "sequence ", i, " has ", page, " for a page it needs");
                  ++holders[size_t(page)];
              });
    for_pages([&](int64_t i) { return args.lengths[i] / args.page_size; },
              [&](int64_t i, int64_t page) {
                  GPT2FAST_CHECK(holders[size_t(page)] == 1, "sequence ", i, " writes to page ",
                                 page, ", which is in use at another place, too");
              });
}

Tensor packed_step(Tensor arena, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k_scales,
                   std::optional<Tensor> v_scales, Tensor tokens, Tensor positions, Tensor starts,
                   Tensor rows, Tensor lengths, Tensor output_tokens, std::optional<Tensor> pages,
                   std::optional<Tensor> singly) {
    StepArgs args = step_args(arena, k_cache, v_cache, k_scales, v_scales);
    args.sequences = rows.numel();
    args.tokens = tokens.numel();
    args.outputs = output_tokens.numel();
    args.starts = integers(starts, "starts", args.sequences + 1, 0, args.tokens);
    int64_t entries = k_cache.size(2);
    if (pages) {
        read_pages(args, *pages, k_cache.size(1), entries);
        GPT2FAST_CHECK(args.pages_stride < (int64_t(1) << 31) / entries, args.pages_stride,
                       " pages of ", entries, " entries are more than a sequence can have");
        entries *= args.pages_stride;
    } else {
        args.rows = integers(rows, "rows", args.sequences, 0, k_cache.size(1) - 1);
    }
    if (singly) {
        check_on_cpu(*singly, "singly");
        check_contiguous(*singly, "singly", {args.sequences});
        check_type(*singly, "singly", ScalarType::Bool, "bool");
        args.singly = static_cast<const bool*>(singly->const_data_ptr());
    }
    args.lengths = integers(lengths, "lengths", args.sequences, 0, entries - 1);
    args.token_ids = integers(tokens, "tokens", args.tokens, 0, args.model->vocab - 1);
    args.positions = integers(positions, "positions", args.tokens, 0, args.model->positions - 1);
    args.output_tokens = integers(output_tokens, "output_tokens", args.outputs, 0, args.tokens - 1);
    GPT2FAST_CHECK(args.starts[0] == 0 && args.starts[args.sequences] == args.tokens,
                   "starts must lead from 0 to ", args.tokens);
    check_room(args, k_cache.size(1), entries);
    if (pages) check_pages(args, k_cache.size(1));
    Tensor logits = floats(arena, {args.outputs, args.model->vocab});
    if (args.tokens == 0) return logits;
    args.logits = floats_of(logits);
    run_step(args, [](Worker&) {});
    return logits;
}

// One more token for each row of the cache, and the choice of the next.
std::tuple<Tensor, Tensor> packed_next(Tensor arena, Tensor k_cache, Tensor v_cache,
                                       std::optional<Tensor> k_scales,
                                       std::optional<Tensor> v_scales, Tensor tokens,
                                       Tensor positions, Tensor lengths, Tensor history,
                                       std::optional<Tensor> uniform,
                                       std::optional<Tensor> token_mask,
                                       int64_t allowed GPT2FAST_SAMPLING_PARAMETERS) {
    StepArgs args = step_args(arena, k_cache, v_cache, k_scales, v_scales);
    const int64_t rows = tokens.numel();
    GPT2FAST_CHECK(k_cache.size(1) == rows, rows, " tokens for a cache of ", k_cache.size(1),
                   " rows");
    GPT2FAST_CHECK(allowed > 0 && allowed <= args.model->vocab, "allowed = ", allowed,
                   " is not in 1 .. ", args.model->vocab);
    args.sequences = args.tokens = args.outputs = rows;
    std::vector<int64_t> numbers(size_t(rows) + 1);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = int64_t(i);
    args.starts = args.rows = args.output_tokens = numbers.data();
    args.lengths = integers(lengths, "lengths", rows, 0, k_cache.size(2) - 1);
    args.token_ids = integers(tokens, "tokens", rows, 0, args.model->vocab - 1);
    args.positions = integers(positions, "positions", rows, 0, args.model->positions - 1);
    check_room(args, k_cache.size(1), k_cache.size(2));
    Tensor logits = floats(arena, {rows, args.model->vocab});
    args.logits = floats_of(logits);

    Tensor out = int64s(arena, {rows});
    const Sample chosen = sample_args(logits, allowed, history, uniform, token_mask, out,
                                      DType::float32, GPT2FAST_SAMPLING_VALUES);
    check_uniform(chosen);
    check_token_mask(chosen);
    if (rows == 0) return {logits, out};

    const int64_t bytes = sample_bytes(chosen);
    uint8_t* const choosing = sample_workspace(bytes * threads());
    run_step(args, [&](Worker& worker) { choose_rows(chosen, worker, choosing, bytes); });
    return {logits, out};
}

}  // namespace

GPT2FAST_OP(
    packed_step,
    "arena, k_cache!, v_cache!, k_scales!, v_scales!, tokens, positions, starts, rows, lengths, "
    "output_tokens, pages, singly");
GPT2FAST_OP(packed_next,
            "arena, k_cache!, v_cache!, k_scales!, v_scales!, tokens, positions, lengths, history, "
            "uniform, token_mask, allowed" GPT2FAST_SAMPLING_NAMES);

}  // namespace gpt2fast::binding
