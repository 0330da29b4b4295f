// Choosing the next token from a row of logits without sorting the vocabulary.
//
// Scores are written once, in groups of 64 whose maxima let later passes leave out what cannot
// matter. Top-k and top-p both look for a boundary in ascending order: the first score at which
// the mass of the scores up to it, a count or a probability, exceeds a limit. One pass measures
// the mass below seven thresholds, the scores of the one range that holds the boundary are
// gathered, and so on until few enough are left to sort. The draw adds up the kept scores' weights
// group by group and walks through the one group that the random number falls into.
//
// Of equal scores at the boundary of top-p the tokens of lower number are left out first, as after
// a stable ascending sort. Weights are float32, sums of many of them float64.
//
// A mask of tokens costs a pass over copied scores, which leaves out words of 32 that are allowed.
//
// A row of V float32 logits is 4 V bytes in and, unless it is greedy, 4 V bytes of scores that
// later passes read from a core's own cache; each pass has V exponentials or none.
#pragma once

namespace gpt2fast::GPT2FAST_ISA {

constexpr int64_t score_group = 64;

// Which scores may be drawn: at least `before` for the tokens before `split`, `after` for the
// others. Below the smallest finite number nothing may.
struct Kept {
    float before = -std::numeric_limits<float>::max();
    float after = -std::numeric_limits<float>::max();
    int64_t split = 0;
};

struct CountMass {
    Vec operator()(Vec) const { return Vec(1.0f); }
};

struct WeightMass {
    Vec largest;
    Vec operator()(Vec score) const { return exp(score - largest); }
};

class SampledRow {
public:
    SampledRow(const Sample& args, int64_t row, uint8_t* workspace)
        : args_(args), row_(row), vocab_(args.vocab), groups_(groups(args.vocab)) {
        sums_ = reinterpret_cast<double*>(workspace);
        scores_ = reinterpret_cast<float*>(sums_ + groups_);
        maxima_ = scores_ + groups_ * score_group;
        found_ = maxima_ + (groups_ + score_group);
        ids_ = reinterpret_cast<int32_t*>(found_ + (groups_ + 1) * score_group);
    }

    static int64_t workspace(int64_t vocab) {
        return groups(vocab) * 8 + 4 * (3 * score_group + 1) * (groups(vocab) + 2);
    }

    int64_t choose() {
        return args_.dtype == DType::float32 ? choose_from<float>() : choose_from<bfloat16>();
    }

private:
    static int64_t groups(int64_t vocab) { return (vocab + score_group - 1) / score_group; }

    template <typename T>
    int64_t choose_from() {
        const T* x = static_cast<const T*>(args_.logits) + row_ * args_.logits_stride;
        const bool reads_history = args_.history_length > 0 && args_.reads_history();
        const bool copies = reads_history || args_.token_mask != nullptr;
        if (copies) {
            for (int64_t i = 0; i < vocab_ / score_group; ++i) {
                for (int64_t j = i * score_group; j < (i + 1) * score_group; j += Vec::width) {
                    Vec::load(x + j).store(scores_ + j);
                }
            }
            for (int64_t i = vocab_ / score_group * score_group; i < vocab_; ++i) {
                scores_[i] = to_float(x[i]);
            }
        }
        if (reads_history) penalize(x);
        if (args_.token_mask != nullptr) ban_masked();
        if (args_.uniform == nullptr) {
            return copies ? highest(scores_) : highest(x);
        }
        if (copies) {
            read(scores_);
        } else {
            read(x);
        }
        // Not a number, infinite, or all banned: no probabilities.
        if (!(largest_ < std::numeric_limits<float>::infinity()) ||
            largest_ == -std::numeric_limits<float>::infinity()) {
            return 0;
        }
        Kept kept;
        if (args_.top_k > 0 && args_.top_k < vocab_) {
            kept.after = kept.before = kth_largest(args_.top_k);
        }
        if (args_.top_p < 1.0) kept = nucleus(kept, float(1.0 - args_.top_p));
        if (args_.typical_p < 1.0) ban_untypical(kept);
        return draw(kept, args_.uniform[row_ * args_.uniform_stride]);
    }

    // Applies what depends on the tokens before to the copied scores; x holds them untouched.
    template <typename T>
    void penalize(const T* x) {
        const int64_t* history = args_.history + row_ * args_.history_stride;
        const int64_t step = args_.history_step, length = args_.history_length;
        const float penalty = float(args_.repetition_penalty);
        if (penalty != 1.0f) {
            for (int64_t i = 0; i < length; ++i) {
                const int64_t token = history[i * step];
                if (token < 0 || token >= vocab_) continue;
                const float score = to_float(x[token]);
                scores_[token] = score < 0 ? score * penalty : score / penalty;
            }
        }
        const int64_t size = args_.no_repeat_ngram_size;
        if (size <= 0 || size > length) return;
        const int64_t* suffix = history + (length - size + 1) * step;
        for (int64_t i = 0; i + size <= length; ++i) {
            const int64_t* window = history + i * step;
            int64_t equal = 0;
            while (equal < size - 1 && window[equal * step] == suffix[equal * step]) ++equal;
            const int64_t token = window[(size - 1) * step];
            if (equal < size - 1 || token < 0 || token >= vocab_) continue;
            scores_[token] = -std::numeric_limits<float>::infinity();
        }
    }

    // No penalty brings a score of -inf back, so that banning last is as good as banning first.
    void ban_masked() {
        const uint32_t* mask = args_.token_mask + row_ * args_.mask_stride;
        for (int64_t begin = 0; begin < vocab_; begin += 32) {
            const uint32_t allowed = mask[begin / 32];
            if (allowed == ~uint32_t(0)) continue;
            const int64_t count = std::min<int64_t>(32, vocab_ - begin);
            float* scores = scores_ + begin;
            for (int64_t i = 0; i < count; ++i) {
                const bool stays = (allowed >> i & 1) != 0;
                scores[i] = stays ? scores[i] : -std::numeric_limits<float>::infinity();
            }
        }
    }

    // The first of the highest elements of x; NaN is the highest of all.
    template <typename T>
    int64_t highest(const T* x) {
        constexpr int vectors = 8;
        constexpr int64_t block = 16 * vectors * Vec::width;
        const Vec infinity(std::numeric_limits<float>::infinity());
        float best = -std::numeric_limits<float>::infinity();
        int64_t found = 0, i = 0;
        for (; i + block <= vocab_; i += block) {
            Vec most[vectors];
            for (int c = 0; c < vectors; ++c) most[c] = Vec(best);
            for (int64_t j = i; j < i + block; j += vectors * Vec::width) {
                for (int c = 0; c < vectors; ++c) {
                    most[c] = max(most[c], min(Vec::load(x + j + c * Vec::width), infinity));
                }
            }
            for (int c = 1; c < vectors; ++c) most[0] = max(most[0], most[c]);
            const float here = reduce_max(most[0]);
            if (here > best) {
                best = here;
                found = i;
            }
        }
        for (; i < vocab_; ++i) {
            const float here = to_float(x[i]);
            if (here > best) {
                best = here;
                found = i;
            } else if (here != here) {
                best = std::numeric_limits<float>::infinity();
            }
        }
        if (best == std::numeric_limits<float>::infinity()) {
            for (i = 0; i < vocab_; ++i) {
                if (to_float(x[i]) != to_float(x[i])) return i;
            }
            found = 0;
        }
        while (!(to_float(x[found]) == best)) ++found;
        return found;
    }

    // Writes the scores, their groups' maxima, the largest and the smallest finite one; behind the
    // last score comes -inf up to a whole group. NaN counts as +inf among the maxima.
    template <typename T>
    void read(const T* x) {
        if (args_.temperature == 1.0f) {
            read_groups<T, false>(x);
        } else {
            read_groups<T, true>(x);
        }
    }

    template <typename T, bool divide>
    void read_groups(const T* x) {
        const Vec infinity(std::numeric_limits<float>::infinity());
        const Vec lowest(-std::numeric_limits<float>::max()), temperature(float(args_.temperature));
        Vec smallest = infinity;
        largest_ = -std::numeric_limits<float>::infinity();
        const auto read_group = [&](int64_t group, const auto* from) {
            float* to = scores_ + group * score_group;
            Vec most(-std::numeric_limits<float>::infinity());
            for (int64_t i = 0; i < score_group; i += Vec::width) {
                Vec score = Vec::load(from + i);
                if (divide) score = score / temperature;
                score.store(to + i);
                most = max(most, min(score, infinity));
                smallest = min(smallest, select(score < lowest, infinity, score));
            }
            maxima_[group] = reduce_max(most);
            largest_ = std::max(largest_, maxima_[group]);
        };
        const int64_t whole = vocab_ / score_group;
        for (int64_t group = 0; group < whole; ++group) read_group(group, x + group * score_group);
        if (const int64_t rest = vocab_ - whole * score_group) {
            float tail[score_group];
            for (int64_t i = 0; i < score_group; ++i) {
                tail[i] = i < rest ? to_float(x[whole * score_group + i])
                                   : -std::numeric_limits<float>::infinity();
            }
            read_group(whole, tail);
        }
        smallest_ = reduce_min(smallest);
    }

    // Gathers the scores of [low, high) in the order of the vocabulary; returns how many.
    int64_t gather(float low, float high) {
        int64_t count = 0;
        for (int64_t group = 0; group < groups_; ++group) {
            if (maxima_[group] < low) continue;
            const int64_t begin = group * score_group;
            for (int64_t i = begin; i < begin + score_group; i += Vec::width) {
                const Vec score = Vec::load(scores_ + i);
                uint32_t inside = bits(score < Vec(high)) & ~bits(score < Vec(low));
                for (; inside != 0; inside &= inside - 1) {
                    const int64_t token = i + __builtin_ctz(inside);
                    found_[count] = scores_[token];
                    ids_[count++] = int32_t(token);
                }
            }
        }
        return count;
    }

    // The smallest and the largest of the gathered scores.
    void find_range(int64_t count, float& low, float& high) const {
        for (int64_t i = count; i % Vec::width != 0; ++i) found_[i] = found_[0];
        Vec least(found_[0]), most(found_[0]);
        for (int64_t i = 0; i < count; i += Vec::width) {
            least = min(Vec::load(found_ + i), least);
            most = max(Vec::load(found_ + i), most);
        }
        high = reduce_max(most);
        low = reduce_min(least);
    }

    static float reduce_min(Vec x) { return -reduce_max(Vec(-1.0f) * x); }

    static constexpr int ranges = 7;
    // Scores whose masses are summed in float32 before they are added in float64.
    static constexpr int64_t measured = 8 * score_group;

    // Thresholds at equal distances above `low`, the last one being `high`.
    static void divide_range(float low, float high, float* thresholds) {
        const float step = high / ranges - low / ranges;  // their difference may overflow
        for (int j = 0; j < ranges; ++j) thresholds[j] = low + step * float(j + 1);
        thresholds[ranges - 1] = high;
    }

    // Mass of `count` scores, a multiple of score_group, below each threshold.
    template <typename Mass>
    struct Measure {
        Mass mass;
        Vec thresholds[ranges];
        double below[ranges] = {};
        double total = 0;

        Measure(Mass mass, const float* at) : mass(mass) {
            for (int j = 0; j < ranges; ++j) thresholds[j] = Vec(at[j]);
        }

        // Adds those of `count` scores, whole groups, that are at least `low`.
        void add(const float* scores, int64_t count, Vec low) {
            Vec sums[ranges], sum(0.0f);
            for (int j = 0; j < ranges; ++j) sums[j] = Vec(0.0f);
            for (int64_t i = 0; i < count; i += Vec::width) {
                const Vec score = Vec::load(scores + i);
                const Vec weight = select(score < low, Vec(0.0f), mass(score));
                sum = sum + weight;
                for (int j = 0; j < ranges; ++j) {
                    sums[j] = sums[j] + select(score < thresholds[j], weight, Vec(0.0f));
                }
            }
            total += reduce_add(sum);
            for (int j = 0; j < ranges; ++j) below[j] += reduce_add(sums[j]);
        }

        // The range that the boundary lies in: the last whose masses before do not exceed.
        template <typename Exceeds>
        int range(double base, Exceeds exceeds) const {
            int j = ranges;
            while (j > 0 && exceeds(base + below[j - 1])) --j;
            return j;
        }
    };

    struct Boundary {
        float score;
        int64_t token;
    };

    // The first of the gathered scores, in ascending order and equal ones in the order of their
    // tokens, up to which the mass exceeds; `base` is the mass of what lies below all of them. The
    // last one if none does.
    template <typename Mass, typename Exceeds>
    Boundary boundary(int64_t count, double base, Mass mass, Exceeds exceeds) {
        constexpr int64_t few = 48;
        for (;;) {
            float low, high;
            find_range(count, low, high);
            if (low == high || count <= few) break;
            // Padding that no threshold is above.
            for (int64_t i = count; i % score_group != 0; ++i) {
                found_[i] = std::numeric_limits<float>::infinity();
            }
            float thresholds[ranges];
            divide_range(low, high, thresholds);
            Measure<Mass> measure(mass, thresholds);
            const int64_t padded = (count + score_group - 1) / score_group * score_group;
            for (int64_t i = 0; i < padded; i += measured) {
                measure.add(found_ + i, std::min(measured, padded - i), Vec(low));
            }
            const int range = measure.range(base, exceeds);
            int64_t kept = 0;
            for (int64_t i = 0; i < count; ++i) {
                const float score = found_[i];
                const bool inside = (range == 0 || !(score < thresholds[range - 1])) &&
                                    (range == ranges || score < thresholds[range]);
                found_[kept] = score;
                ids_[kept] = ids_[i];
                kept += inside;
            }
            count = kept;
            if (range > 0) base += measure.below[range - 1];
        }
        // Stable; equal scores, however many, are in order already.
        for (int64_t i = 1; i < count; ++i) {
            const float score = found_[i];
            const int32_t id = ids_[i];
            int64_t j = i;
            for (; j > 0 && score < found_[j - 1]; --j) {
                found_[j] = found_[j - 1];
                ids_[j] = ids_[j - 1];
            }
            found_[j] = score;
            ids_[j] = id;
        }
        int64_t i = 0;
        for (; i < count - 1; ++i) {
            float values[Vec::width];
            mass(Vec(found_[i])).store(values);
            base += values[0];
            if (exceeds(base)) break;
        }
        return {found_[i], ids_[i]};
    }

    // The boundary among all scores of at least `low`; the first thresholds begin at `start`.
    // exceeds_of(total) says what mass of scores, from the lowest on, exceeds.
    template <typename Mass, typename ExceedsOf>
    Boundary boundary_of_all(float low, float start, Mass mass, ExceedsOf exceeds_of) {
        float thresholds[ranges];
        divide_range(std::max(low, start), largest_, thresholds);
        Measure<Mass> measure(mass, thresholds);
        for (int64_t group = 0, end = 0; group < groups_; group = end) {
            for (; end < groups_ && end - group < measured / score_group; ++end) {
                if (maxima_[end] < low) break;
            }
            if (end == group) {
                ++end;
            } else {
                measure.add(scores_ + group * score_group, (end - group) * score_group, Vec(low));
            }
        }
        const auto exceeds = exceeds_of(measure.total);
        const int range = measure.range(0.0, exceeds);
        const int64_t count =
            gather(range == 0 ? low : thresholds[range - 1],
                   range == ranges ? std::numeric_limits<float>::infinity() : thresholds[range]);
        return boundary(count, range == 0 ? 0.0 : measure.below[range - 1], mass, exceeds);
    }

    float kth_largest(int64_t k) {
        // The k-th largest of the maxima has at least k scores that are no smaller; their smallest
        // has as many as there are groups.
        constexpr float lowest = -std::numeric_limits<float>::max();
        const auto exceeds_of = [=](double total) {
            const double others = std::max(0.0, total - double(k));
            return [=](double mass) { return mass > others; };
        };
        if (k > groups_) {
            float start = largest_;
            for (int64_t i = 0; i < groups_; ++i) {
                if (maxima_[i] >= lowest) start = std::min(start, maxima_[i]);
            }
            // So that the first threshold is that one: most scores are below it.
            start -= (largest_ - start) / (ranges - 1);
            return boundary_of_all(lowest, start, CountMass{}, exceeds_of).score;
        }
        for (int64_t i = 0; i < groups_; ++i) {
            found_[i] = std::max(lowest, maxima_[i]);
            ids_[i] = 0;
        }
        const float low = boundary(groups_, 0.0, CountMass{}, exceeds_of(double(groups_))).score;
        const int64_t count = gather(low, std::numeric_limits<float>::infinity());
        if (count < k) return lowest;
        return boundary(count, 0.0, CountMass{}, exceeds_of(double(count))).score;
    }

    // Leaves out the least likely ones whose share of what is kept does not exceed `rest`.
    Kept nucleus(Kept kept, float rest) {
        constexpr float far = 16.0f;  // below the largest score: e^-16 of its weight
        const Boundary edge = boundary_of_all(
            kept.after, std::max(smallest_, largest_ - far), WeightMass{Vec(largest_)},
            [=](double total) { return [=](double mass) { return float(mass / total) > rest; }; });
        return {std::nextafter(edge.score, std::numeric_limits<float>::infinity()), edge.score,
                edge.token};
    }

    // Bans all but the scores nearest to the expected one that have typical_p of what is kept.
    void ban_untypical(const Kept& kept) {
        float weights[score_group];
        const auto for_kept = [&](auto visit) {  // score below the largest, weight
            for (int64_t group = 0; group < groups_; ++group) {
                if (maxima_[group] < kept.after) continue;
                weigh(group, kept, weights);
                float* scores = scores_ + group * score_group;
                for (int64_t i = 0; i < score_group; ++i) {
                    if (weights[i] > 0.0f) visit(scores[i], weights[i]);
                }
            }
        };
        double total = 0.0, moment = 0.0;
        for_kept([&](float& score, float weight) {
            total += weight;
            moment += double(weight) * double(score - largest_);
        });
        const float expected = largest_ + float(moment / total);

        // The order of the distances' bits is theirs. Halving their range finds the farthest.
        float* masses = reinterpret_cast<float*>(ids_);
        uint32_t* distances = reinterpret_cast<uint32_t*>(found_);
        const auto distance_of = [&](float score) {
            const float distance = std::fabs(score - expected);
            uint32_t bits;
            std::memcpy(&bits, &distance, sizeof bits);
            return bits;
        };
        int64_t begin = 0, end = 0;
        uint32_t nearest = ~uint32_t(0), farthest = 0;
        for_kept([&](float& score, float weight) {
            distances[end] = distance_of(score);
            nearest = std::min(nearest, distances[end]);
            farthest = std::max(farthest, distances[end]);
            masses[end++] = weight;
        });
        const double wanted = args_.typical_p * total;
        double nearer = 0.0;
        while (nearest < farthest) {
            const uint32_t middle = nearest + (farthest - nearest) / 2;
            int64_t split = begin;
            double mass = nearer;
            for (int64_t i = begin; i < end; ++i) {
                if (distances[i] > middle) continue;
                mass += masses[i];
                std::swap(distances[i], distances[split]);
                std::swap(masses[i], masses[split++]);
            }
            if (mass >= wanted) {
                farthest = middle;
                end = split;
            } else {
                nearest = middle + 1;
                nearer = mass;
                begin = split;
            }
        }
        for_kept([&](float& score, float) {
            if (distance_of(score) > farthest) score = -std::numeric_limits<float>::infinity();
        });
    }

    // The weights of a group's scores, zero where they are not kept.
    void weigh(int64_t group, const Kept& kept, float* weights) const {
        const int64_t begin = group * score_group;
        const bool split = begin < kept.split && kept.split < begin + score_group;
        const Vec low(begin < kept.split && !split ? kept.before : kept.after);
        const Vec least(float(args_.min_p)), none(0.0f);
        for (int64_t i = 0; i < score_group; i += Vec::width) {
            const Vec score = Vec::load(scores_ + begin + i);
            Vec weight = exp(score - Vec(largest_));
            weight = select(weight < least, none, weight);
            select(score < low, none, weight).store(weights + i);
        }
        if (split) {
            for (int64_t i = 0; begin + i < kept.split; ++i) {
                if (scores_[begin + i] < kept.before) weights[i] = 0.0f;
            }
        }
    }

    // The first token whose cumulative weight exceeds uniform * total.
    int64_t draw(const Kept& kept, float uniform) {
        float weights[score_group];
        double total = 0.0;
        for (int64_t group = 0; group < groups_; ++group) {
            sums_[group] = 0.0;
            if (maxima_[group] < kept.after) continue;
            weigh(group, kept, weights);
            Vec sum(0.0f);
            for (int64_t i = 0; i < score_group; i += Vec::width) {
                sum = sum + Vec::load(weights + i);
            }
            sums_[group] = reduce_add(sum);
            total += sums_[group];
        }
        const double target = double(uniform) * total;
        double before = 0.0;
        for (int64_t group = 0; group < groups_; ++group) {
            if (!(before + sums_[group] > target)) {
                before += sums_[group];
                continue;
            }
            weigh(group, kept, weights);
            int64_t token = 0;
            for (int64_t i = 0; i < score_group; ++i) {
                if (!(weights[i] > 0.0f)) continue;
                token = group * score_group + i;
                before += weights[i];
                if (before > target) break;
            }
            return token;
        }
        return 0;
    }

    const Sample& args_;
    int64_t row_, vocab_, groups_;
    float largest_ = 0.0f, smallest_ = 0.0f;
    double* sums_;   // of each group's weights
    float* scores_;  // whole groups
    float* maxima_;  // of each group
    // Gathered scores and their tokens, and room to fill the last group up.
    float* found_;
    int32_t* ids_;
};

inline void sample(const Sample& args, int64_t begin, int64_t end, uint8_t* workspace) {
    for (int64_t row = begin; row < end; ++row) {
        args.out[row] = SampledRow(args, row, workspace).choose();
    }
}

inline int64_t sample_workspace(const Sample& args) { return SampledRow::workspace(args.vocab); }

}  // namespace gpt2fast::GPT2FAST_ISA
