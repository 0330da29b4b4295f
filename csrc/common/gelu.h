// GELU in its tanh form (Hendrycks & Gimpel, 2016), as GPT-2 has it:
//
//     gelu(z) = z / 2 * (1 + tanh(u)) = z / (1 + e^-2u),  u = gelu_scale * (z + gelu_cubic * z^3)
#pragma once

namespace gpt2fast {

constexpr float gelu_scale = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float gelu_cubic = 0.044715f;

}  // namespace gpt2fast
