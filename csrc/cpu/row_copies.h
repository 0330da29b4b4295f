// In which order rows can be moved so that none is overwritten before it is read.
#pragma once

#include <vector>

#include "kernels.h"

namespace gpt2fast {

// Copies that amount to row[i] = row[from[i]] for all i of [0, count) at once. A row that nobody
// reads any more is written first; what is left then are rings, and each passes through the spare
// row.
std::vector<RowCopy> row_copies(const int64_t* from, int64_t count, int64_t rows);

}  // namespace gpt2fast
