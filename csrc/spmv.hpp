// A sparse matrix times one vector. There is nothing to reuse here, so it is a matter of bytes and of latency.
//
// Sixteen rows are sixteen lanes. The columns are cut into segments of 32, whose x fill two registers; every step of a segment takes
// one weight of each row and picks its x with a permutation by 5-bit indices, kept in a byte each: 5 bytes a weight, no gather. Rows
// of a slice that have fewer weights in a segment than the longest one fill up with zeros. The segments of a slice are sorted by
// their steps, so that the loops have lengths that a branch predictor gets right.
#pragma once
#include <vector>

#include "strip.hpp"

namespace rarefy {

constexpr std::size_t SLICE_ROWS = 16, SEGMENT = 32, LONGEST = 16;  // more steps than LONGEST are several entries of a segment

struct VectorRun {
    const std::uint32_t* classes;   // [LONGEST + 1] a slice: how many entries have 0 (never), 1, 2, ... steps
    const std::uint32_t* segments;  // one per entry: its first column
    const std::uint8_t* index;      // [step][16]: column within the segment
    const float* values;            // [step][16]
};

struct VectorKernels {
    // sums[0 .. 16) = the slice times x, where x may be read to the end of the last segment.
    void (*slice)(const VectorRun& run, const float* x, float* sums);
};
RAREFY_EVERY_LEVEL(extern const VectorKernels vector_product)

class Spmv {
public:
    explicit Spmv(const Csr& w);

    void set_values(const float* values);

    // x [cols] -> y [rows]
    void run(const float* x, float* y, const float* bias, Act act, std::size_t threads) const;

    std::size_t bytes() const;

private:
    struct Slice {
        std::size_t entry, step;
    };
    std::size_t rows_, cols_, segments_;
    std::vector<Slice> slices_;  // where each begins, and the end
    std::vector<std::uint32_t> classes_, row_, first_, order_;
    std::vector<std::uint8_t> index_;
    std::vector<float> values_;
};

}  // namespace rarefy
