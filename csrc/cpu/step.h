// The arguments of a whole-model step, and how packed weights lie in memory.
//
// All weights of a model are one block of memory, the arena: a header of 64-bit words, then the
// matrices and vectors that it points to. gpt2fast/ops/packed.py writes it.
#pragma once

#include <cstdint>

#include "types.h"

namespace gpt2fast {

constexpr int panel_columns = 32;

enum class Format : int64_t { float32, bfloat16, int8, int4, float16 };

// A weight matrix (inputs, outputs) as panels of 32 columns. Within a panel, for each unit of
// inputs in turn, the 32 columns' words of 4 bytes: one float32, two bfloat16 or four int8, in the
// order of the inputs. float16 is not paired: each input's 32 columns follow each other, so that
// one instruction widens a vector of them. Of quantized matrices each group of inputs begins with
// the columns' scales, 32 float16; weights are stored as unsigned bytes q + 128, or two to a byte
// as q + 8: inputs 8i .. 8i + 3 in the low halves of a word, 8i + 4 .. 8i + 7 in the high ones.
struct PackedMatrix {
    Format format;
    int64_t inputs;
    int64_t padded_inputs;  // a multiple of the group, of 2 in 16 bits; what is added is zero
    int64_t outputs;
    int64_t group;       // inputs that share a scale; 0 without quantization
    int64_t data;        // bytes from the arena's begin, as all offsets here
    int64_t panel_size;  // bytes
    int64_t bias;        // float32, zeros up to a multiple of 32 columns; -1 without

    int64_t panels() const { return (outputs + panel_columns - 1) / panel_columns; }
};

struct PackedLayer {
    int64_t ln_1_weight, ln_1_bias, ln_2_weight, ln_2_bias;  // float32
    double scale;                                            // on the attention scores
    PackedMatrix qkv, attention_out, inner, mlp_out;
};

enum class Activation : int64_t { gelu_new, gelu, relu, silu, tanh };

constexpr int64_t packed_magic = 0x3174736166327467;  // "gt2fast1"

struct PackedModel {
    int64_t magic;
    int64_t size;  // bytes of the arena
    int64_t layers, heads, head_dim, width, inner_width, vocab, positions;
    Activation activation;
    double eps;
    int64_t wpe;  // (positions, width) float32
    int64_t ln_f_weight, ln_f_bias;
    PackedMatrix embedding;   // (width, vocab)
    PackedMatrix projection;  // the same matrix where they are tied
    // PackedLayer[layers] follows.

    const uint8_t* at(int64_t offset) const {
        return reinterpret_cast<const uint8_t*>(this) + offset;
    }
    const float* floats(int64_t offset) const { return reinterpret_cast<const float*>(at(offset)); }
    const PackedLayer& layer(int64_t index) const {
        return reinterpret_cast<const PackedLayer*>(this + 1)[index];
    }
};

// Keys or values: (layers, rows, entries, heads, head_dim), the last two contiguous. Of an int8
// cache there is a float32 scale for each (layer, row, entry, head), the heads contiguous. Rows are
// those of sequences, or pages from which sequences are put together.
struct CacheView {
    void* data;
    int64_t layer_stride, row_stride, entry_stride;  // elements
    float* scales;
    int64_t scale_layer_stride, scale_row_stride, scale_entry_stride;
};

// New tokens of some sequences pass through the model; their keys and values are appended to the
// sequences' rows of the cache.
struct StepArgs {
    const PackedModel* model;
    CacheView k_cache, v_cache;
    DType cache_dtype;
    int64_t sequences;
    const int64_t* starts;   // (sequences + 1): where each sequence's tokens begin
    const int64_t* rows;     // (sequences): row of the cache; ignored with pages
    const int64_t* lengths;  // (sequences): entries of it before
    // Entry t of sequence s is entry t % page_size of row pages[s * pages_stride + t / page_size];
    // null: sequences have rows of their own. page_size is a multiple of 16.
    const int64_t* pages;
    int64_t pages_stride, page_size;
    // (sequences): whether a sequence's tokens attend one by one, and not in blocks; null: where it
    // has a single one.
    const bool* singly;
    int64_t tokens;
    const int64_t* token_ids;  // (tokens)
    const int64_t* positions;  // (tokens)
    int64_t outputs;
    const int64_t* output_tokens;  // (outputs): which tokens' logits are wanted
    float* logits;                 // (outputs, vocab)
    uint8_t* workspace;            // Kernels::step_workspace() bytes, aligned to 64
    int64_t read_ahead;  // bytes, of whole lines, by which a thread prefetches weights, or 0
};

}  // namespace gpt2fast
