// Checks that the simulator's layouts are those of CuTe (NVIDIA's own statement of them, which a
// host can read): how many elements lie elsewhere, by the name of what was compared.
#pragma once

#include <map>
#include <string>

namespace gpt2fast::simulated {

std::map<std::string, int> layout_mismatches();

}  // namespace gpt2fast::simulated
