// Whole steps of a packed model, and the choice of a token.
#include "tensors.h"

#include <cstdlib>
#include <memory>

#include "../../cpu/step.h"

namespace gpt2fast::binding {
namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// Memory aligned for the kernels, which they use until it goes.
std::unique_ptr<void, Free> workspace_of(int64_t bytes, int64_t tokens) {
    std::unique_ptr<void, Free> memory(std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64));
    STD_TORCH_CHECK(memory != nullptr, "gpt2fast: no memory for a step of ", tokens, " tokens: ",
                    bytes, " bytes");
    return memory;
}

CacheView view(const Tensor& cache, const std::optional<Tensor>& scales) {
    CacheView out{cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2),
                  nullptr, 0, 0, 0};
    if (scales) {
        out.scales = floats_of(*scales);
        out.scale_layer_stride = scales->stride(0);
        out.scale_row_stride = scales->stride(1);
        out.scale_entry_stride = scales->stride(2);
    }
    return out;
}

// A contiguous int64 tensor whose values lie in [low, high].
const int64_t* integers(const Tensor& x, const char* name, int64_t size, int64_t low,
                        int64_t high) {
    STD_TORCH_CHECK(x.is_contiguous(), "gpt2fast: ", name, " must be contiguous");
    std::vector<int64_t> copy;  // of a single element, which may have any stride
    checked(x, name, size, low, high, copy);
    return static_cast<const int64_t*>(x.const_data_ptr());
}

// The arguments of a step that do not depend on its tokens.
StepArgs step_args(const Tensor& arena, const Tensor& k_cache, const Tensor& v_cache,
                   const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales) {
    const auto* model = static_cast<const PackedModel*>(arena.const_data_ptr());
    STD_TORCH_CHECK(arena.numel() >= int64_t(sizeof *model) && model->magic == packed_magic &&
                        model->size == arena.numel(),
                    "gpt2fast: these are not packed weights");
    for (const Tensor* cache : {&k_cache, &v_cache}) {
        check_on_cpu(*cache, "caches");
        STD_TORCH_CHECK(cache->dim() == 5 && cache->size(0) == model->layers &&
                            cache->size(3) == model->heads && cache->size(4) == model->head_dim &&
                            cache->stride(4) == 1 && cache->stride(3) == model->head_dim,
                        "gpt2fast: caches must be (", model->layers, ", rows, entries, ",
                        model->heads, ", ", model->head_dim, "), the last two contiguous");
        STD_TORCH_CHECK(cache->size(1) == k_cache.size(1) && cache->size(2) == k_cache.size(2),
                        "gpt2fast: both caches must have as many rows and entries");
    }
    for (const auto* scales : {&k_scales, &v_scales}) {
        if (!*scales) continue;
        check_on_cpu(**scales, "scales");
        STD_TORCH_CHECK((*scales)->scalar_type() == ScalarType::Float && (*scales)->dim() == 4 &&
                            (*scales)->size(0) == model->layers &&
                            (*scales)->size(1) == k_cache.size(1) &&
                            (*scales)->size(2) == k_cache.size(2) &&
                            (*scales)->size(3) == model->heads && (*scales)->stride(3) == 1,
                        "gpt2fast: scales must be float32 (", model->layers, ", ", k_cache.size(1),
                        ", ", k_cache.size(2), ", ", model->heads, "), the last contiguous");
    }
    STD_TORCH_CHECK((dtype_of(k_cache) == DType::int8) == k_scales.has_value() &&
                        k_scales.has_value() == v_scales.has_value() &&
                        v_cache.scalar_type() == k_cache.scalar_type(),
                    "gpt2fast: int8 caches, and only they, come with scales");
    StepArgs args{};
    args.model = model;
    args.k_cache = view(k_cache, k_scales);
    args.v_cache = view(v_cache, v_scales);
    args.cache_dtype = dtype_of(k_cache);
    return args;
}

void check_room(const StepArgs& args, int64_t rows, int64_t entries) {
    std::vector<bool> taken(static_cast<size_t>(rows));
    for (int64_t i = 0; i < args.sequences; ++i) {
        const int64_t count = args.starts[i + 1] - args.starts[i];
        STD_TORCH_CHECK(count > 0, "gpt2fast: starts must rise: sequence ", i, " has ", count,
                        " tokens");
        STD_TORCH_CHECK(args.lengths[i] + count <= entries, "gpt2fast: row ",
                        args.rows[i], " holds ", args.lengths[i], " of at most ", entries,
                        " entries; ", count, " more do not fit");
        STD_TORCH_CHECK(!taken[size_t(args.rows[i])], "gpt2fast: row ", args.rows[i],
                        " is there twice");
        taken[size_t(args.rows[i])] = true;
    }
}

Tensor packed_step(Tensor arena, Tensor k_cache, Tensor v_cache, std::optional<Tensor> k_scales,
                   std::optional<Tensor> v_scales, Tensor tokens, Tensor positions, Tensor starts,
                   Tensor rows, Tensor lengths, Tensor output_tokens) {
    StepArgs args = step_args(arena, k_cache, v_cache, k_scales, v_scales);
    args.sequences = rows.numel();
    args.tokens = tokens.numel();
    args.outputs = output_tokens.numel();
    args.starts = integers(starts, "starts", args.sequences + 1, 0, args.tokens);
    args.rows = integers(rows, "rows", args.sequences, 0, k_cache.size(1) - 1);
    args.lengths = integers(lengths, "lengths", args.sequences, 0, k_cache.size(2) - 1);
    args.token_ids = integers(tokens, "tokens", args.tokens, 0, args.model->vocab - 1);
    args.positions = integers(positions, "positions", args.tokens, 0, args.model->positions - 1);
    args.output_tokens =
        integers(output_tokens, "output_tokens", args.outputs, 0, args.tokens - 1);
    STD_TORCH_CHECK(args.starts[0] == 0 && args.starts[args.sequences] == args.tokens,
                    "gpt2fast: starts must lead from 0 to ", args.tokens);
    check_room(args, k_cache.size(1), k_cache.size(2));
    Tensor logits =
        torch::stable::new_empty(arena, {args.outputs, args.model->vocab}, ScalarType::Float);
    if (args.tokens == 0) return logits;
    args.logits = floats_of(logits);
    const int team = threads();
    const auto workspace = workspace_of(kernels().step_workspace(args, team), args.tokens);
    args.workspace = static_cast<uint8_t*>(workspace.get());
    run_team(team, [&](Member& member) { kernels().step(args, member); });
    return logits;
}

// How tokens are chosen: the options of `sample`.
struct Choice {
    double temperature;
    int64_t top_k;
    double top_p, min_p, repetition_penalty;
    int64_t no_repeat_ngram_size;

    bool reads_history() const { return repetition_penalty != 1.0 || no_repeat_ngram_size > 0; }
};

// What both ops that choose tokens share; logits, history and the result are left to them.
Sample sample_args(const Choice& choice, int64_t rows, const std::optional<Tensor>& uniform) {
    Sample args{};
    if (uniform) {
        check_on_cpu(*uniform, "uniform");
        STD_TORCH_CHECK(uniform->scalar_type() == ScalarType::Float && uniform->dim() == 1 &&
                            uniform->size(0) == rows,
                        "gpt2fast: uniform must be float32 (", rows, ",)");
        args.uniform = static_cast<const float*>(uniform->const_data_ptr());
        args.uniform_stride = uniform->stride(0);
    }
    args.temperature = float(choice.temperature);
    args.top_k = choice.top_k;
    args.top_p = choice.top_p;
    args.min_p = float(choice.min_p);
    args.repetition_penalty = float(choice.repetition_penalty);
    args.no_repeat_ngram_size = choice.no_repeat_ngram_size;
    return args;
}

void set_history(Sample& args, const Tensor& history, int64_t rows) {
    check_on_cpu(history, "history");
    STD_TORCH_CHECK(history.scalar_type() == ScalarType::Long && history.dim() == 2 &&
                        history.size(0) == rows,
                    "gpt2fast: history must be int64 (", rows, ", tokens)");
    args.history = static_cast<const int64_t*>(history.const_data_ptr());
    args.history_length = history.size(1);
    args.history_stride = history.stride(0);
    args.history_step = history.stride(1);
}

// Room for each member of a team to choose in. Kept between steps: fresh memory of this size would
// be mapped and cleared for each.
uint8_t* sample_workspace(int64_t bytes) {
    thread_local std::vector<uint8_t> workspace;
    if (workspace.size() < size_t(bytes)) workspace.resize(size_t(bytes));
    return workspace.data();
}

void choose_rows(const Sample& args, int64_t rows, Member& member, uint8_t* workspace,
                 int64_t bytes) {
    member.for_each(rows, [&](int64_t row) {
        kernels().sample(args, row, row + 1, workspace + bytes * member.index());
    });
}

int64_t sample_bytes(const Sample& args) {
    return (kernels().sample_workspace(args) + 63) / 64 * 64;
}

Tensor sample(Tensor logits, Tensor history, std::optional<Tensor> uniform, double temperature,
              int64_t top_k, double top_p, double min_p, double repetition_penalty,
              int64_t no_repeat_ngram_size) {
    STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 &&
                        (logits.size(1) == 1 || logits.stride(1) == 1),
                    "gpt2fast: logits must be (rows, vocab), the last contiguous");
    const int64_t rows = logits.size(0);
    const Choice choice{temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size};
    Sample args = sample_args(choice, rows, uniform);
    args.logits = logits.const_data_ptr();
    args.vocab = logits.size(1);
    args.logits_stride = logits.stride(0);
    args.dtype = dtype_of(logits);
    if (choice.reads_history()) set_history(args, history, rows);
    Tensor out = torch::stable::new_empty(logits, {rows}, ScalarType::Long);
    args.out = static_cast<int64_t*>(out.mutable_data_ptr());

    // The team, not torch's threads: those would spin on, into the model's next step.
    constexpr int64_t worthwhile = 32768;  // elements for which a second thread pays
    const int team = rows * args.vocab < worthwhile ? 1 : int(std::min<int64_t>(rows, threads()));
    const int64_t bytes = sample_bytes(args);
    uint8_t* const workspace = sample_workspace(bytes * team);
    if (team == 1) {
        kernels().sample(args, 0, rows, workspace);
    } else {
        run_team(team,
                 [&](Member& member) { choose_rows(args, rows, member, workspace, bytes); });
    }
    return out;
}

// One more token for each row of the cache, and the choice of the next.
std::tuple<Tensor, Tensor> packed_next(Tensor arena, Tensor k_cache, Tensor v_cache,
                                       std::optional<Tensor> k_scales,
                                       std::optional<Tensor> v_scales, Tensor tokens,
                                       Tensor positions, Tensor lengths, Tensor history,
                                       std::optional<Tensor> uniform, int64_t allowed,
                                       double temperature, int64_t top_k, double top_p,
                                       double min_p, double repetition_penalty,
                                       int64_t no_repeat_ngram_size) {
    StepArgs args = step_args(arena, k_cache, v_cache, k_scales, v_scales);
    const int64_t rows = tokens.numel();
    STD_TORCH_CHECK(k_cache.size(1) == rows, "gpt2fast: ", rows, " tokens for a cache of ",
                    k_cache.size(1), " rows");
    STD_TORCH_CHECK(allowed > 0 && allowed <= args.model->vocab, "gpt2fast: allowed = ", allowed,
                    " is not in 1 .. ", args.model->vocab);
    args.sequences = args.tokens = args.outputs = rows;
    std::vector<int64_t> numbers(size_t(rows) + 1);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = int64_t(i);
    args.starts = args.rows = args.output_tokens = numbers.data();
    args.lengths = integers(lengths, "lengths", rows, 0, k_cache.size(2) - 1);
    args.token_ids = integers(tokens, "tokens", rows, 0, args.model->vocab - 1);
    args.positions = integers(positions, "positions", rows, 0, args.model->positions - 1);
    check_room(args, k_cache.size(1), k_cache.size(2));
    Tensor logits = torch::stable::new_empty(arena, {rows, args.model->vocab}, ScalarType::Float);
    args.logits = floats_of(logits);

    const Choice choice{temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size};
    Sample chosen = sample_args(choice, rows, uniform);
    chosen.logits = args.logits;
    chosen.vocab = allowed;
    chosen.logits_stride = args.model->vocab;
    chosen.dtype = DType::float32;
    if (choice.reads_history()) set_history(chosen, history, rows);
    Tensor out = torch::stable::new_empty(arena, {rows}, ScalarType::Long);
    if (rows == 0) return {logits, out};
    chosen.out = static_cast<int64_t*>(out.mutable_data_ptr());

    const int team = threads();
    const auto workspace = workspace_of(kernels().step_workspace(args, team), rows);
    args.workspace = static_cast<uint8_t*>(workspace.get());
    const int64_t bytes = sample_bytes(chosen);
    uint8_t* const choosing = sample_workspace(bytes * team);
    run_team(team, [&](Member& member) {
        kernels().step(args, member);
        choose_rows(chosen, rows, member, choosing, bytes);
    });
    return {logits, out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gpt2fast_native, m) {
    m.def(
        "packed_step(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
        "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor starts, Tensor rows, "
        "Tensor lengths, Tensor output_tokens) -> Tensor");
    m.def(
        "packed_next(Tensor arena, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scales, "
        "Tensor(d!)? v_scales, Tensor tokens, Tensor positions, Tensor lengths, Tensor history, "
        "Tensor? uniform, int allowed, float temperature, int top_k, float top_p, float min_p, "
        "float repetition_penalty, int no_repeat_ngram_size) -> (Tensor, Tensor)");
    m.def(
        "sample(Tensor logits, Tensor history, Tensor? uniform, float temperature, int top_k, "
        "float top_p, float min_p, float repetition_penalty, int no_repeat_ngram_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gpt2fast_native, CPU, m) {
    m.impl("packed_step", TORCH_BOX(&packed_step));
    m.impl("packed_next", TORCH_BOX(&packed_next));
    m.impl("sample", TORCH_BOX(&sample));
}

}  // namespace gpt2fast::binding
