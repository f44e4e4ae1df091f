// Filling a capped simplex: u_j = clip(mu a_j - c_j, 0, 1) with the mu at which they add up to k, in time linear in their number.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace rarefy {

// Some entries seen from two levels p <= q of mu. An entry is settled when it is 0 at both, 1 at both, or strictly between at both.
struct SimplexTally {
    double at_p = 0, at_q = 0;               // the sums of u at p and at q, of all entries
    double full = 0, slope = 0, offset = 0;  // settled ones: how many are 1, and sums of a and of c of those between
    std::size_t open = 0, positive = 0;      // entries not settled, and those with a > 0
    bool bad = false;                        // an entry is negative or not finite
};

template <class T> struct SimplexTable {
    // c[0] stands for all entries when c_step is 0. open[i] = 1 where entry i is not settled. Sums run in eight lanes, the same at
    // every instruction set.
    SimplexTally (*scan)(const T* a, const T* c, std::size_t c_step, std::size_t n, double p, double q, std::uint8_t* open);
    void (*fill)(const T* a, const T* c, std::size_t c_step, std::size_t n, double mu, T* u);
};

struct SimplexKernels {
    SimplexTable<float> f32;
    SimplexTable<double> f64;
};
RAREFY_EVERY_LEVEL(extern const SimplexKernels simplex)

// For each of `rows` rows of n entries: u as above with sum k[row * k_step], or 1 wherever a > 0 when there are no more than k of
// those. a and c must be finite and not negative; c has one entry (c_step 0) or rows * n (c_step 1). The result does not depend on
// the number of threads. Returns true, with u left unfinished, when an entry is negative or not finite.
template <class T>
bool capped_simplex(const T* a, const T* c, std::size_t c_step, std::size_t rows, std::size_t n, const std::int64_t* k,
                    std::size_t k_step, T* u, std::size_t threads);

}  // namespace rarefy
