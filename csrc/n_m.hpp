// Weights with a fixed number kept in every run of M inputs (N:M), and the three products of training with them.
//
// The weight is cut into tiles of 16 outputs x 16 inputs. Since M divides 16, every output keeps N * 16 / M weights of a tile: so many
// *steps*, each of which takes one weight of every output. Outputs are the lanes of a vector: a step is one load of weights, one
// permutation of the tile's 16 inputs, one multiply-add; no gather, no transposed copies of activations, no row pointers. A step's
// weights and places are fetched once for several samples, which share them.
//
// A tile of a *transposable* mask keeps as many weights in every column as in every row, so its bipartite graph of outputs and inputs
// is the union of that many perfect matchings (Koenig): every step can be a permutation, and serves the transposed product by its
// inverse. Both are kept, four bits each, beside one copy of the weights.
//
// Layout, with T = 16: values float [row tiles][column tiles][steps][T], zero where a step has no weight for an output;
// index int32 [row tiles][column tiles][lines][T], four steps a line: bits 4 s .. of lane r are the input of output r in step s, bits
// 16 + 4 s .. of lane c the output of input c; used uint16 [row tiles][column tiles][steps]: bit r tells whether output r has a weight.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "epilogue.hpp"
#include "isa.hpp"
#include "layer.hpp"
#include "strip.hpp"

namespace rarefy {

constexpr std::size_t NM_TILE = 16, NM_LINE = 4, NM_OUTPUTS = 2, NM_SAMPLES = 8, NM_DOTS = 12;

struct NMShape {
    std::size_t rows, cols, steps;
    std::size_t row_tiles() const { return (rows + NM_TILE - 1) / NM_TILE; }
    std::size_t col_tiles() const { return (cols + NM_TILE - 1) / NM_TILE; }
    std::size_t tiles() const { return row_tiles() * col_tiles(); }
    std::size_t lines() const { return (steps + NM_LINE - 1) / NM_LINE; }
    std::size_t values() const { return tiles() * steps * NM_TILE; }
    std::size_t index() const { return tiles() * lines() * NM_TILE; }
};

// Some tiles of outputs times some samples.
struct NMRun {
    const float* values;
    const std::int32_t* index;
    std::size_t value_step, index_step;  // from one tile of outputs to the next
    std::size_t tiles, last, steps;      // tiles of inputs, inputs of the last one, steps of each
    const float* bias;                   // of the first output, or null
    Act act;
    std::size_t tail;                    // outputs of the last tile of outputs
};

// Some tiles of inputs for one tile of outputs: a gradient for each of their weights.
struct NMDots {
    const float* x;                      // [tile] panels [samples][T]
    std::size_t x_step;                  // floats from one tile's panel to the next
    const float* dy;                     // [samples][T]
    std::size_t samples, tiles, steps;
    const std::int32_t* index;
    float* out;                          // [tiles][steps][T]
    bool add;                            // to what is there
};

struct NMKernels {
    bool permutes;  // a whole tile by one instruction
    // y[s][r] = act(bias[r] + sum of the weights of output r times x[s]) for s < samples and `outputs` tiles of outputs.
    void (*product)(const NMRun&, std::size_t outputs, std::size_t samples, const float* x, std::size_t x_ld, float* y,
                    std::size_t y_ld);
    void (*dots)(const NMDots&);
    // A tile as the transposed product wants it.
    void (*turn)(const float* values, const std::int32_t* index, std::size_t steps, float* to_values, std::int32_t* to_index);
    // A tile as four quads of outputs for the kernels of strips (strip.hpp): the weights and places of the next step of quad q go to
    // q * quad_step; a place counts from `first` inputs before the tile. `inverse`: of the transposed product.
    void (*strips)(const float* values, const std::int32_t* index, std::size_t steps, bool inverse, std::size_t first, float* to_values,
                   std::uint16_t* to_offsets, std::size_t quad_step);
    // A tile's weights from a dense matrix, and back; `weight` is the tile's corner. Places beyond the first `rows` outputs or `cols`
    // inputs lie outside of the matrix: whatever an index says (it may come from a file), they are neither read nor written.
    void (*gather)(const float* weight, std::size_t ld, std::size_t rows, std::size_t cols, const std::int32_t* index,
                   const std::uint16_t* used, std::size_t steps, float* values);
    void (*scatter)(const float* values, const std::int32_t* index, const std::uint16_t* used, std::size_t steps, float* weight,
                    std::size_t ld, std::size_t rows, std::size_t cols);
};
RAREFY_EVERY_LEVEL(extern const NMKernels n_m)

// A weight or its index structure: pointers into arrays of the layout above.
struct NMWeight {
    NMShape shape;
    const float* values;          // null where only the structure is meant
    const std::int32_t* index;
    const std::uint16_t* used;
};

// Fills index and used from a mask [rows][cols]. False where a row of a tile keeps more than `steps`, or, when the steps must be
// permutations (`both`), a column does.
bool n_m_index(const std::uint8_t* mask, const NMShape& shape, bool both, std::int32_t* index, std::uint16_t* used, std::size_t threads);

void n_m_gather(const NMWeight& w, const float* weight, float* values, std::size_t threads);   // dense [rows][cols] -> values
void n_m_scatter(const NMWeight& w, float* weight, std::size_t threads);                       // values -> dense, zeros elsewhere

// Two ways to run a product; `n_m_forward` and `n_m_input_gradient` choose. With outputs in the lanes nothing is transposed or copied.
// With samples in the lanes (the strips of the unstructured kernel) a multiply-add takes its inputs from the first cache instead of
// permuting them; the weights are spread out for it anew in every call. `inverse`: with the transposed weight.
void n_m_by_tiles(const NMWeight& w, bool inverse, const float* x, std::size_t n, const float* bias, Act act, float* y,
                  std::size_t threads);
void n_m_by_strips(const NMWeight& w, bool inverse, const float* x, std::size_t n, const float* bias, Act act, float* y,
                   std::size_t threads);

// x [n][cols] -> y [n][rows]
void n_m_forward(const NMWeight& w, const float* x, std::size_t n, const float* bias, Act act, float* y, std::size_t threads);
// dy [n][rows] -> dx [n][cols]; of a weight whose steps are permutations
void n_m_input_gradient(const NMWeight& w, const float* dy, std::size_t n, float* dx, std::size_t threads);
// x, dy -> one number per weight, zero where there is none
void n_m_values_gradient(const NMWeight& w, const float* x, const float* dy, std::size_t n, float* out, std::size_t threads);

// A linear layer of a native network.
class NMLinear : public Layer {
public:
    NMLinear(const NMShape& shape, std::vector<float> values, std::vector<std::int32_t> index, std::size_t tokens, std::vector<float> bias,
             Act act);
    void run(const float* const* inputs, float* output, float* scratch, std::size_t batch, std::size_t threads) const override;
    std::size_t bytes() const;

private:
    NMShape shape_;
    std::vector<float> values_;
    std::vector<std::int32_t> index_;
    std::size_t tokens_;
    std::vector<float> bias_;
    Act act_;
};

}  // namespace rarefy
