// What every sparse and dense operator may do to its result before storing it: y = act(sum + bias + residual).
#pragma once
#include <cstddef>

namespace rarefy {

enum class Act { none, relu, relu6, hardswish, silu, sigmoid, hardsigmoid };

// For an output row (channel, feature) m and column (pixel, sample) n.
struct Epilogue {
    const float* bias = nullptr;      // [rows], or null
    const float* residual = nullptr;  // residual[m * residual_ld + n], or null
    std::size_t residual_ld = 0;
    Act act = Act::none;
    bool empty() const { return bias == nullptr && residual == nullptr && act == Act::none; }
};

}  // namespace rarefy
