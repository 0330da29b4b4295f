// Registers ops with torch. The schema follows from the function, and from the names of its
// arguments, which C++ does not tell:
//
//     GPT2FAST_OP(append, "x, cache!, scales!=None");
//
// "!" marks a tensor that the op writes, "=" what an argument is if it is left out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace gpt2fast::binding {

// How a schema writes a C++ type: a name, and what follows it.
struct SchemaType {
    const char* name;
    const char* suffix = "";
};

template <typename T>
constexpr SchemaType schema_type = T::no_type_of_a_schema;
template <>
inline constexpr SchemaType schema_type<torch::stable::Tensor> = {"Tensor"};
template <>
inline constexpr SchemaType schema_type<std::optional<torch::stable::Tensor>> = {"Tensor", "?"};
template <>
inline constexpr SchemaType schema_type<std::vector<torch::stable::Tensor>> = {"Tensor", "[]"};
template <>
inline constexpr SchemaType schema_type<std::vector<double>> = {"float", "[]"};
template <>
inline constexpr SchemaType schema_type<double> = {"float"};
template <>
inline constexpr SchemaType schema_type<int64_t> = {"int"};
template <>
inline constexpr SchemaType schema_type<bool> = {"bool"};
template <>
inline constexpr SchemaType schema_type<std::string> = {"str"};

template <typename Result>
struct SchemaResult {
    static std::string text() { return schema_type<Result>.name; }
};
template <>
struct SchemaResult<void> {
    static std::string text() { return "()"; }
};
template <typename First, typename... Others>
struct SchemaResult<std::tuple<First, Others...>> {
    static std::string text() {
        return std::string("(") + schema_type<First>.name +
               ((std::string(", ") + schema_type<Others>.name) + ...) + ")";
    }
};

template <typename Result, typename... Arguments>
std::string schema_of(const char* op, Result (*)(Arguments...), std::string names) {
    std::string schema = std::string(op) + "(";
    char alias = 'a';
    [[maybe_unused]] const auto add = [&](const SchemaType& type) {
        const size_t end = names.find(", ");
        std::string name = names.substr(0, end);
        names = end == std::string::npos ? "" : names.substr(end + 2);
        schema += type.name;
        if (const size_t mark = name.find('!'); mark != std::string::npos) {
            name.erase(mark, 1);
            schema += std::string("(") + alias++ + "!)";
        }
        schema += std::string(type.suffix) + " " + name + (names.empty() ? "" : ", ");
    };
    (add(schema_type<Arguments>), ...);
    return schema + ") -> " + SchemaResult<Result>::text();
}

// The function of the op's name, for the dispatch key, in a namespace of torch.ops.
#define GPT2FAST_REGISTER(ops, key, op, names)                                           \
    STABLE_TORCH_LIBRARY_FRAGMENT(ops, m) { m.def(schema_of(#op, &op, names).c_str()); } \
    STABLE_TORCH_LIBRARY_IMPL(ops, key, m) { m.impl(#op, TORCH_BOX(&op)); }              \
    static_assert(true, "takes the semicolon that follows")

}  // namespace gpt2fast::binding
