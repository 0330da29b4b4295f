// Greedy decoding of a batch with libllama, behind a C interface that does not change with llama.cpp's
// structs: setup_peers.py compiles this against the headers of the checkout.

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "llama.h"

namespace {

double now() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

struct Peer {
    llama_model* model = nullptr;
    llama_context* context = nullptr;
    int threads = 0;
    int rows = 0;
    int length = 0;
    int vocabulary = 0;
};

// A context for this many rows and entries a row; the last one is kept.
bool prepare(Peer& peer, int rows, int prompt, int length) {
    if (peer.context != nullptr && peer.rows == rows && peer.length == length) {
        return true;
    }
    if (peer.context != nullptr) {
        llama_free(peer.context);
    }
    llama_context_params params = llama_context_default_params();
    const int padded = (length + 255) / 256 * 256;
    params.n_ctx = static_cast<uint32_t>(rows * padded);
    params.n_seq_max = static_cast<uint32_t>(rows);
    params.n_batch = static_cast<uint32_t>(std::max(rows * prompt, 512));
    params.n_threads = params.n_threads_batch = peer.threads;
    params.kv_unified = rows == 1;  // rows share no prefix
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;  // faster than without, on CPUs too
    params.no_perf = true;
    peer.context = llama_init_from_model(peer.model, params);
    peer.rows = rows;
    peer.length = length;
    return peer.context != nullptr;
}

// The likeliest token of output `index`.
int likeliest(const Peer& peer, int index) {
    const float* logits = llama_get_logits_ith(peer.context, index);
    return static_cast<int>(std::max_element(logits, logits + peer.vocabulary) - logits);
}

void add(llama_batch& batch, int token, int position, int row, bool wants_logits) {
    const int at = batch.n_tokens++;
    batch.token[at] = token;
    batch.pos[at] = position;
    batch.n_seq_id[at] = 1;
    batch.seq_id[at][0] = row;
    batch.logits[at] = wants_logits ? 1 : 0;
}

}  // namespace

extern "C" {

// Null if the file cannot be loaded.
void* peer_load(const char* path, int threads) {
    llama_log_set(
        [](ggml_log_level level, const char* text, void*) {
            if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) {
                std::fputs(text, stderr);
            }
        },
        nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    llama_model* model = llama_model_load_from_file(path, params);
    if (model == nullptr) {
        return nullptr;
    }
    auto* peer = new Peer;
    peer->model = model;
    peer->threads = threads;
    peer->vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    return peer;
}

// What this libllama was built for.
const char* peer_system() { return llama_print_system_info(); }

// prompts: (rows, prompt); out: (rows, count); seconds: of the first tokens, and of the others.
// Returns 0, or what llama_decode returned, or -100 where no context could be made.
int peer_generate(void* handle, const int* prompts, int rows, int prompt, int count, int* out,
                  double* seconds) {
    Peer& peer = *static_cast<Peer*>(handle);
    if (!prepare(peer, rows, prompt, prompt + count)) {
        return -100;
    }
    llama_memory_clear(llama_get_memory(peer.context), false);
    llama_batch batch = llama_batch_init(rows * prompt, 0, 1);
    double start = now();
    int failed = 0;
    for (int step = 0; step < count && failed == 0; ++step) {
        batch.n_tokens = 0;
        for (int row = 0; row < rows; ++row) {
            if (step > 0) {
                add(batch, out[row * count + step - 1], prompt + step - 1, row, true);
                continue;
            }
            for (int t = 0; t < prompt; ++t) {
                add(batch, prompts[row * prompt + t], t, row, t == prompt - 1);
            }
        }
        failed = llama_decode(peer.context, batch);
        for (int row = 0; row < rows && failed == 0; ++row) {
            out[row * count + step] = likeliest(peer, step > 0 ? row : (row + 1) * prompt - 1);
        }
        if (step == 0) {
            seconds[0] = now() - start;
            start = now();
        }
    }
    seconds[1] = now() - start;
    llama_batch_free(batch);
    return failed;
}
}
