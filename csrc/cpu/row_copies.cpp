#include "row_copies.h"

namespace gpt2fast {

std::vector<RowCopy> row_copies(const int64_t* from, int64_t count, int64_t rows) {
    std::vector<RowCopy> plan;
    std::vector<int64_t> readers(size_t(rows), 0);
    for (int64_t i = 0; i < count; ++i) {
        if (from[i] != i) ++readers[size_t(from[i])];
    }
    std::vector<char> waits(size_t(count), 0);
    std::vector<int64_t> ready;
    for (int64_t i = 0; i < count; ++i) {
        if (from[i] == i) continue;
        waits[size_t(i)] = 1;
        if (readers[size_t(i)] == 0) ready.push_back(i);
    }
    while (!ready.empty()) {
        const int64_t to = ready.back(), source = from[to];
        ready.pop_back();
        plan.push_back({to, source});
        waits[size_t(to)] = 0;
        if (--readers[size_t(source)] == 0 && source < count && waits[size_t(source)]) {
            ready.push_back(source);
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        if (!waits[size_t(i)]) continue;
        plan.push_back({-1, i});
        int64_t to = i;
        for (; from[to] != i; to = from[to]) {
            plan.push_back({to, from[to]});
            waits[size_t(to)] = 0;
        }
        plan.push_back({to, -1});
        waits[size_t(to)] = 0;
    }
    return plan;
}

}  // namespace gpt2fast
