// The heart of the sparse products: packed sparse weights times a strip of activations.
//
// A strip holds, for each input k of a block, one run of V vectors (V * LANES columns: pixels, or samples); it is small enough
// for the first cache. A Stream is a sparse weight packed once for blocks of inputs. The load ports are what limits such a
// product, so the weights are packed in groups of four rows: within a group and a block, columns are sorted by which of the four
// rows use them (15 patterns), and one load of activations serves up to four rows. Each pattern is a straight run without
// branches, and rows that use the same columns are put into one group wherever they stand in the weight. Where few rows share a
// column, the badly predicted ends of short runs cost more than loads: there four rows of like lengths go in step, a weight of
// each at a time (quads). For few columns (V <= 2) latency is the limit: eight rows (slices).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "epilogue.hpp"
#include "isa.hpp"

namespace rarefy {

// A sparse matrix in compressed rows; columns ascend within a row.
struct Csr {
    const std::int64_t* crow;   // [rows + 1]
    const std::int32_t* col;    // [nnz]
    const float* values;        // [nnz], or null: they come later
    std::size_t rows, cols;
    const std::uint32_t* position = nullptr;  // [nnz]: where each nonzero's value stands; null: in this order
};

constexpr std::uint32_t NO_ROW = UINT32_MAX;  // fills the last group or slice of a part

// One part of the rows in one block of the inputs. Rows count from the part's first.
struct GroupRun {
    const std::uint16_t* counts;   // [groups][15]: columns of each pattern; bit r of pattern + 1 says that row r uses them
    const std::uint32_t* rows;     // [groups][4]
    std::size_t groups;
    const std::uint16_t* offsets;  // one per column: its input's place in the block
    const float* values;           // one per nonzero
};

struct SliceRun {  // of R rows
    const std::uint16_t* steps;    // [slices]
    const std::uint32_t* rows;     // [slices][R]
    std::size_t slices;
    const std::uint16_t* offsets;  // [step][R]; a row that has ended points at the strip's row of zeros
    const float* values;           // [step][R]
};

// Where results come from and go to: row m starts at from + m * from_ld (null: from zero) and to + m * to_ld.
struct StripTarget {
    const float* from;
    std::size_t from_ld;
    float* to;
    std::size_t to_ld;
    std::size_t tail;            // floats stored of the last vector
    const Epilogue* epilogue;    // null: none; its pointers count from this part's first row and this strip's first column
};

// groups: of four rows, by pattern. quads, slices: four or eight rows in step, for many and for few columns.
enum class Packing { groups, quads, slices };

// Whether a strip needs a row of zeros behind its inputs.
inline bool in_step(Packing packing) { return packing != Packing::groups; }

constexpr std::size_t LONGEST_BLOCK = 32768;  // inputs: places in a block are 16 bits, which halves what indices read
constexpr std::size_t GROUP = 4, SLICE = 8, QUAD = 4, MOST_VECTORS = 4, MOST_SLICE_VECTORS = 2;

struct StripLoops {
    void (*groups[MOST_VECTORS + 1])(const GroupRun&, const char* x, std::size_t stride, const StripTarget&);
    void (*quads[MOST_VECTORS + 1])(const SliceRun&, const char* x, std::size_t stride, const StripTarget&);
    void (*slices[MOST_SLICE_VECTORS + 1])(const SliceRun&, const char* x, std::size_t stride, const StripTarget&);
};

struct StripKernels {
    std::size_t lanes;       // floats a vector
    std::size_t vectors[3];  // how many a tile may have, by packing
    StripLoops loops;
    // strip[k][0 .. width) = x[k * ld + 0 .. n), zeros behind; width is a multiple of the lanes.
    void (*pack)(const float* x, std::size_t ld, std::size_t k, std::size_t n, float* strip, std::size_t width);
    // strip[k][i] = x[i * ld + k] for i < n, zeros behind.
    void (*pack_transposed)(const float* x, std::size_t ld, std::size_t k, std::size_t n, float* strip, std::size_t width);
    // y[i * ld + m] = act(c[m * width + i] + bias[m]) for m < rows, i < n.
    void (*unpack_transposed)(const float* c, std::size_t width, std::size_t rows, std::size_t n, float* y, std::size_t ld,
                              const float* bias, Act act);
    // y[m * ld + i] = act(c[m * width + i] + bias[m] + residual): n columns of every row.
    void (*unpack)(const float* c, std::size_t width, std::size_t rows, std::size_t n, float* y, std::size_t ld,
                   const Epilogue&);
    // Which of the rows of bits (those `which` names, of `words` words each) has most bits in common with `bits`: the first such.
    std::size_t (*most_alike)(const std::uint64_t* bits, const std::uint64_t* rows, std::size_t words, const std::uint32_t* which,
                              std::size_t n);
};
RAREFY_EVERY_LEVEL(extern const StripKernels strip)

inline const StripKernels& strip_kernels() { return RAREFY_AT_LEVEL(strip); }

// What a word of 32 bits holds, in weights and activations alike: a float; two bfloat16, summed in float32; or four bytes, signed
// weights and unsigned activations, summed in int32.
enum class Words { float32, bfloat16, int8 };

const StripLoops& strip_loops(Words words);  // of the instruction set in use (lowp.cpp)

class Stream {
public:
    // `ends`: ascending last inputs (exclusive) of the blocks, the last one w.cols; none longer than LONGEST_BLOCK. `parts`
    // contiguous ranges of rows of about equal work.
    Stream(const Csr& w, const std::vector<std::size_t>& ends, Packing packing, std::size_t parts, Words words = Words::float32);

    void set_values(const float* values);  // by the matrix's positions

    std::size_t parts() const { return first_row_.size() - 1; }
    std::size_t blocks() const { return ends_.size(); }
    std::size_t first_row(std::size_t part) const { return first_row_[part]; }
    std::size_t rows(std::size_t part) const { return first_row_[part + 1] - first_row_[part]; }
    std::size_t block_first(std::size_t block) const { return block == 0 ? 0 : ends_[block - 1]; }
    std::size_t block_size(std::size_t block) const { return ends_[block] - block_first(block); }
    Packing packing() const { return packing_; }
    std::size_t bytes() const;

    // One part of the rows times one block's strip of `vectors` vectors; `stride` in bytes.
    void run(std::size_t part, std::size_t block, const char* x, std::size_t stride, std::size_t vectors,
             const StripTarget& target) const;

private:
    struct Section {  // where a (part, block) lies in the arrays
        std::size_t group = 0, offset = 0, value = 0, groups = 0;
    };
    void pack_groups(const Csr& w, std::size_t part);
    void pack_slices(const Csr& w, std::size_t part, std::size_t height);

    Packing packing_;
    Words words_;
    std::vector<std::size_t> ends_, first_row_;
    std::vector<Section> sections_;  // [part][block]
    std::vector<std::uint16_t> counts_, offsets_;
    std::vector<std::uint32_t> rows_, order_;
    std::vector<float> values_;
};

}  // namespace rarefy
