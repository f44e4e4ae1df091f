// What kernel_planes.cpp takes from its neighbours.
#pragma once
#include "planes.hpp"
#include "simd.hpp"

namespace rarefy::RAREFY_LEVEL {

// The activations that are a clamp, applied where a sum is stored. The others (`curved`) take a second pass while it is in the cache.
struct Clamp {
    vf low, high;
    bool curved;
    explicit Clamp(Act act)
        : low(set1(act == Act::relu || act == Act::relu6 ? 0.0f : -__builtin_inff())),
          high(set1(act == Act::relu6 ? 6.0f : __builtin_inff())),
          curved(act != Act::none && act != Act::relu && act != Act::relu6) {}
    vf operator()(vf x) const { return min(high, max(low, x)); }  // in this order a NaN passes
};

void pointwise(const float* x, float* y, std::size_t n, Act act);
float pointwise_sum(const float* x, std::size_t n);
void pointwise_add(const float* a, const float* b, float* y, std::size_t n, Act act);
void pointwise_multiply(const float* a, const float* b, float* y, std::size_t n, Act act);
void pointwise_affine(const float* a, float scale, float shift, float* y, std::size_t n, Act act);
void softmax(const float* x, float* y, std::size_t n);
void pack_dense(const float* w, std::size_t rows, std::size_t cols, float* packed);
void dense(const float* packed, const float* bias, const float* x, float* y, std::size_t rows, std::size_t cols, std::size_t n,
           std::size_t from, std::size_t to, Act act);
std::size_t direct_floats(const Direct& d);
void direct(const Direct& d, std::size_t image, std::size_t row, float* tile);

}  // namespace rarefy::RAREFY_LEVEL
