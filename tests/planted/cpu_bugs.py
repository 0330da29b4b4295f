"""Bugs of the CPU kernels (csrc/cpu and csrc/binding/cpu)."""

from __future__ import annotations

from bugs import Bug

BORDERS = "test_borders.py::test_"
ATTENTION = f"{BORDERS}attention_of_several_rows_and_heads"
CACHED = f"{BORDERS}cached_attention_of_several_rows_and_heads"
CACHES = "test_cache.py::test_appending_to_views"
NORM = f"{BORDERS}residual_layer_norm[native]"
GELU = f"{BORDERS}bias_gelu[native]"
LOSS = f"{BORDERS}linear_cross_entropy[native]"
TIES = f"{BORDERS}what_lies_exactly_at_a_threshold"
MASK = "test_token_mask.py::test_"
PACKED = "test_packed_borders.py::test_a_step_of_odd_sizes"
PAGES = "test_packed_pages.py::test_native_pages_and_single_tokens_are_as_exact_as_torchs"
SINGLY = "test_packed_pages.py::test_a_native_token_depends_on_its_own_text_alone"
ADAMW = f"{BORDERS}fused_adamw"
FORMS = "test_attention_forms.py::test_matches_torch_in_every_form"
DROPOUT = "test_attention.py::test_dropout_goes_on_in_the_next_head_row_and_block[native]"

_NARROWED = "[](Vec x) {{ bfloat16 b[Vec::width]; x.store(b); return Vec::load(b); }}({})"

BUGS = (
    Bug(
        "causal mask off by one",
        "csrc/cpu/attention.h",
        "select(lanes.v[c] < Vec(float(«key - first»)), hidden, scores)",
        "key - first - 1",
        (ATTENTION,),
    ),
    Bug(
        "masked scores scaled after masking: -inf times a scale of 0",
        "csrc/cpu/attention.h",
        "const Vec score = «visible_scores(Vec::load(row) * Vec(scale), lanes, c, first,\n"
        "                                                 begin + j, weighting)»;",
        "visible_scores(Vec::load(row), lanes, c, first, begin + j, weighting) * Vec(scale)",
        (ATTENTION,),
    ),
    Bug(
        "a query that sees nothing is divided by a sum of 0",
        "csrc/cpu/attention.h",
        "«select(none < total[c], Vec(1.0f) / total[c], total[c])».store(inverse",
        "(Vec(1.0f) / total[c])",
        ("test_attention.py::test_a_query_that_sees_nothing_gives_zeros_and_no_gradient[native]",),
    ),
    Bug(
        "values read with the stride of the keys",
        "csrc/cpu/attention.h",
        "pack_entries<format>(«head_of<T>(args.v, row, key_head)», packed",
        "(Entries<T>{head_of<T>(args.v, row, key_head).data, args.k.entry_stride})",
        (ATTENTION,),
    ),
    Bug(
        "values read with the stride of the keys, backward",
        "csrc/cpu/attention_backward.h",
        "const Entries<T> v = «head_of<T>(forward.v, row, key_head)»;",
        "(Entries<T>{head_of<T>(forward.v, row, key_head).data, forward.k.entry_stride})",
        (ATTENTION,),
    ),
    Bug(
        "sum of the weights in 16 bits",
        "csrc/cpu/attention.h",
        "total[c] = «fma(total[c], kept, sum)»;",
        _NARROWED.format("fma(total[c], kept, sum)"),
        (ATTENTION,),
    ),
    Bug(
        "sums not scaled down at the second block of keys",
        "csrc/cpu/attention.h",
        "if («begin > 0») {",
        "begin > key_block",
        (ATTENTION,),
    ),
    Bug(
        "dropout: all heads share the counters of the first",
        "csrc/cpu/attention.h",
        "args.seed, uint32_t(row * args.heads + «head»)};",
        "0",
        (DROPOUT,),
    ),
    Bug(
        "dropout: Philox counters used again for every row of the batch",
        "csrc/cpu/attention.h",
        "args.seed, uint32_t(«row * args.heads» + head)};",
        "0",
        (DROPOUT,),
    ),
    Bug(
        "dropout: counters begin again at the second block of keys, backward",
        "csrc/cpu/attention_backward.h",
        "dropout_factors(weighting, first, «key + j», factors + j * n);",
        "int64_t(j)",
        (DROPOUT,),
    ),
    Bug(
        "attention that is not causal ends at the block of the queries",
        "csrc/cpu/attention.h",
        "return args.causal ? first + queries : «args.time»;",
        "first + queries",
        (FORMS,),
    ),
    Bug(
        "query heads read the key heads in turn",
        "csrc/cpu/attention.h",
        "key_head = «head / args.group()»;",
        "head % args.key_heads",
        (FORMS,),
    ),
    Bug(
        "packed keys of one head serve the next key head",
        "csrc/cpu/attention.h",
        "if («packed_head != row * args.key_heads + key_head») {",
        "packed_head < 0",
        (FORMS,),
    ),
    Bug(
        "gradients of the keys are the first query head's alone",
        "csrc/cpu/attention_backward.h",
        "part < «forward.group() * blocks»; ++part",
        "blocks",
        (FORMS,),
    ),
    Bug(
        "dropout of a shared key head repeats the first query head's, backward",
        "csrc/cpu/attention_backward.h",
        "const Weighting weighting = weighting_of(forward, row, «head»);",
        "key_head",
        ("test_attention_forms.py::test_dropout_draws_by_query_head",),
    ),
    Bug(
        "cache: the second block of queries sees no more than the first",
        "csrc/cpu/cached_attention.h",
        "const int64_t first = «args.lengths[row] + start»;",
        "args.lengths[row]",
        (CACHED,),
    ),
    Bug(
        "cache: values of a batch's rows begin where its keys do",
        "csrc/cpu/cached_attention.h",
        "const Entries<T> v = «head_of<T>(args.v, row, head)»;",
        "(Entries<T>{args.v.as<const T>().data + row * args.k.row_stride + "
        "head * args.v.head_stride, args.v.entry_stride})",
        (CACHED,),
    ),
    Bug(
        "one query: the last element of an odd head size is left out",
        "csrc/cpu/attention_heads.h",
        "const int n = «std::min(Vec::width, size - d)»;\n"
        "            even = fma(Vec::load(q + d, n), Vec::load(key + d, n), even);",
        "std::min(Vec::width, size - d) & ~1",
        (CACHED,),
    ),
    Bug(
        "int8 cache: heads past the 16th take the first ones' factors",
        "csrc/cpu/attention_heads.h",
        "if (scales != nullptr) later.scales += «head»;",
        "0",
        (PACKED,),
    ),
    Bug(
        "int8 cache: the elements that fill no vector do not count for the factor",
        "csrc/cpu/decode.h",
        "for (int64_t i = whole; i < size; ++i) most = «std::max(most, std::fabs(x[i]))»;",
        "most",
        (PACKED,),
    ),
    Bug(
        "parts of the entries are added without their distance from the largest score",
        "csrc/cpu/attention_heads.h",
        "const Vec kept = «exp(before - most)»,",
        "Vec(1.0f)",
        (PAGES,),
    ),
    Bug(
        "a token that is read singly beside the next one sees that one, too",
        "csrc/cpu/decode.h",
        "begin, std::min(end, «seen»), k, v,",
        "seen + int64_t(token + 1 < tokens_of(args_, sequence))",
        (SINGLY,),
    ),
    Bug(
        "a page's first entry is looked for in the page before",
        "csrc/cpu/attention_heads.h",
        "return pages[«uint32_t(t)» / uint32_t(page_size)];",
        "(uint32_t(t) - (t > 0))",
        (PAGES,),
    ),
    Bug(
        "all entries of a page share its first 16 places",
        "csrc/cpu/attention_heads.h",
        "return «uint32_t(t) % uint32_t(page_size)»;",
        "(uint32_t(t) % 16)",
        (PAGES,),
    ),
    Bug(
        "epsilon outside the square root",
        "csrc/cpu/layer_norm.h",
        "1.0f / «std::sqrt(variance + args.eps)»;",
        "(std::sqrt(variance) + args.eps)",
        (NORM,),
    ),
    Bug(
        "lanes past the last column count for the variance",
        "csrc/cpu/layer_norm.h",
        "const Vec d = «covered(load(summed + j, step) - Vec(mean), step)»;",
        "(load(summed + j, step) - Vec(mean))",
        (NORM,),
    ),
    Bug(
        "bias added twice",
        "csrc/cpu/layer_norm.h",
        "store(fma(standard, load(weight + j, step), «load(bias + j, step)»), normed + j,",
        "(load(bias + j, step) + load(bias + j, step))",
        (NORM,),
    ),
    Bug(
        "gradient of the weight without the last row of every block but the first",
        "csrc/cpu/layer_norm.h",
        "row < «args.blocks.begin(block + 1)»; ++row) {\n            const G* grad",
        "args.blocks.begin(block + 1) - (block > 0)",
        (NORM,),
    ),
    Bug(
        "packed step: columns that fill no vector do not count for the variance",
        "csrc/cpu/decode.h",
        "tail += «(x[i] - mean) * (x[i] - mean)»;",
        "0.0f",
        (PACKED,),
    ),
    Bug(
        "gradient of the bias summed in 16 bits",
        "csrc/cpu/mlp.h",
        "store(«load(sums + j, step) + product», sums + j, step);",
        _NARROWED.format("load(sums + j, step) + product"),
        (GELU,),
    ),
    Bug(
        "lanes past the last class count for the loss",
        "csrc/cpu/cross_entropy.h",
        "sum.v[chain] = sum.v[chain] + «covered(weight, step)»;",
        "weight",
        (LOSS,),
    ),
    Bug(
        "sum not scaled down at the second block of classes",
        "csrc/cpu/cross_entropy.h",
        "total = «total * std::exp(before - largest)» + sum.total();",
        "total",
        (LOSS,),
    ),
    Bug(
        "embedding: of a token's look-ups the last one is left out where there are more than 64",
        "csrc/cpu/embedding.h",
        "i < «args.starts[row + 1]»; ++i) {",
        "std::min(args.starts[row + 1], args.starts[row] + 64)",
        ("test_borders.py::test_embedding[native]",),
    ),
    Bug(
        "embedding: look-ups take the place of the projection's gradient",
        "csrc/cpu/embedding.h",
        "const Vec before = «args.add ? load(out + j, step) : Vec(0.0f)»;",
        "Vec(0.0f)",
        ("./test_tied_gradient.py::test_it_is_the_sum_of_both",),
    ),
    Bug(
        "AdamW: epsilon inside the square root",
        "csrc/cpu/optimizer.h",
        "const Vec spread = «fma(sqrt(v), unbiasing, eps)»;",
        "(sqrt(v + eps) * unbiasing)",
        (ADAMW,),
    ),
    Bug(
        "AdamW: the second piece of a 16-bit gradient begins where float32's would",
        "csrc/binding/cpu/optimizer.cpp",
        "grad + at * «int64_t(grads[i].element_size())»",
        "int64_t(4)",
        (ADAMW,),
    ),
    Bug(
        "appending one entry more than counted",
        "csrc/cpu/cache.h",
        "if (args.counts != nullptr && «t >= args.counts[row]») continue;",
        "t > args.counts[row]",
        (CACHES,),
    ),
    Bug(
        "top-k: of k scores the lowest is left out",
        "csrc/cpu/sampling.h",
        "const double others = «std::max(0.0, total - double(k))»;",
        "std::max(0.0, total - double(k - 1))",
        (f"{BORDERS}ties_at_a_threshold",),
    ),
    Bug(
        "top-p: a share that equals 1 - p stays",
        "csrc/cpu/sampling.h",
        "return «float(mass / total) > rest»;",
        "float(mass / total) >= rest",
        (TIES,),
    ),
    Bug(
        "min-p: a weight that equals the limit is left out",
        "csrc/cpu/sampling.h",
        "weight = select(«weight < least», none, weight);",
        "(weight < least + Vec(1e-7f))",
        (TIES,),
    ),
    Bug(
        "mask of tokens: each bit stands for the next token",
        "csrc/cpu/sampling.h",
        "const bool stays = («allowed >> i & 1») != 0;",
        "(uint64_t(allowed) << 1) >> i & 1",
        (f"{MASK}a_masked_token_has_no_score[0.5-33-native]",),
    ),
    Bug(
        "mask of tokens: bits beyond the vocabulary count as tokens",
        "csrc/binding/cpu/sampling.h",
        "const uint32_t rest = «(uint32_t(1) << args.vocab % 32) - 1»;",
        "~uint32_t(0)",
        (f"{MASK}a_step_chooses_among_what_its_mask_allows[33-native]",),
    ),
    Bug(
        "int8 weights: of a partial group the elements that fill no vector are not scaled",
        "csrc/cpu/packed_rows.h",
        "if («k < count») largest = max(largest, abs(Vec::load(x + k, count - k)));",
        "false",
        (PACKED,),
    ),
    Bug(
        "int4 weights: rows of embeddings take the first group's scale",
        "csrc/cpu/gemm.h",
        "const uint8_t* group = panel + «k / w.group» * group_size;",
        "(bytes ? k / w.group : 0)",
        (PACKED,),
    ),
    Bug(
        "float16 weights: the last two inputs are left out",
        "csrc/cpu/gemm.h",
        """const int64_t units = «rows.words() / unit_words<format>»;
        for_parts""",
        "rows.words() / unit_words<format> - (format == Format::float16)",
        (PACKED,),
    ),
    Bug(
        "AVX2, bfloat16 weights: the odd inputs meet the even ones of the rows",
        "csrc/cpu/gemm.h",
        "add_halves<true>(sums, panel, «x + R»);",
        "x",
        (PACKED,),
        isa="avx2",
    ),
    Bug(
        "AVX2, int8 weights: the odd bytes meet the even ones of the rows",
        "csrc/cpu/simd/avx2.h",
        "add_half_bytes<true>(sums, panel, «tile + 4 * R»);",
        "tile",
        (PACKED,),
        isa="avx2",
    ),
    Bug(
        "AVX2, int4 weights: what is summed in 16 bits is not added to the sum before",
        "csrc/cpu/simd/avx2.h",
        "return «before + _mm256_madd_epi16(v, _mm256_set1_epi16(1))»;",
        "_mm256_madd_epi16(v, _mm256_set1_epi16(1))",
        (PACKED,),
        isa="avx2",
    ),
)
"""The number of a bug is its place here, from 1 on: one library holds all, and shows one."""
