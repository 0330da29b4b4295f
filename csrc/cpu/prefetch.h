// What a product of packed weights asks for while it multiplies.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

// Prefetches while a panel is at work, for each word of the inputs and each row of scales: `stride`
// bytes at `far`, from memory into the second level of the cache, since the first can wait for few
// lines at a time. Where the panel meets a single tile of rows, too, what is near goes from there
// into the first.
struct Ahead {
    const uint8_t* far = nullptr;  // or null: nothing is prefetched
    int64_t stride = 0;            // 128, or less where the panel meets several tiles
    // With a single tile: where `far` is to go on at `then`, and `near` is to end.
    const uint8_t *far_end = nullptr, *then = nullptr, *near = nullptr, *near_end = nullptr;

    template <int lines = panel_columns * 4 / 64>
    void ask() {
        if (far == nullptr) return;
        __builtin_prefetch(far, 0, 2);
        if (stride < 128) {
            far += stride;
            return;
        }
        if (lines > 1) __builtin_prefetch(far + 64, 0, 2);
        far += 64 * lines;
        if (far >= far_end) {
            far = then;
            far_end = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
        }
        if (near >= near_end) return;
        for (int i = 0; i < lines; ++i) __builtin_prefetch(near + 64 * i, 0, 3);
        near += 64 * lines;
    }

    // For one part of `count` of the panel's columns, which take their turns.
    Ahead of_part(int part, int count, int64_t bytes) const {
        if (far == nullptr || count == 1) return *this;
        if (stride < 128) return {far + bytes / 128 * stride * part / count, stride / count};
        return part == 0 ? *this : Ahead{};
    }
};

// An Ahead that asks for nothing, which takes no registers.
struct NoPrefetch {
    template <int lines = 0>
    void ask() {}
};

constexpr int64_t near_ahead = 4096;  // bytes

// What to prefetch while a panel meets its only tile of rows: what is read `distance` bytes later,
// of the same panels, which end at `end`, or of those that begin at `next`.
inline Ahead read_ahead(const uint8_t* panel, const uint8_t* end, const uint8_t* next,
                        int64_t distance) {
    const int64_t past = distance - (end - panel);
    if (past < 0) return {panel + distance, 128, end, next, panel + near_ahead, end};
    const auto* never = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
    return {next + past, 128, never, nullptr, panel + near_ahead, end};
}

// What to prefetch while tile `index` of several is multiplied: half the next panel, which follows
// this one, for each of the first two.
inline Ahead next_panel(const uint8_t* panel, int64_t panel_size, int64_t index) {
    if (index >= 2) return {};
    return {panel + panel_size + index * (panel_size / 2), 64};
}

}  // namespace gpt2fast::GPT2FAST_ISA
