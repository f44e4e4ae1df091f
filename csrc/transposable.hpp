// Masks that keep n in every row and every column of m x m tiles, so that the kept scores add up to the most.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace rarefy {

// A run of tiles: entry (i, j) of tile t stands at t * tile + i * row + j * column, in the scores as in the mask.
struct TileRun {
    std::size_t tiles, tile, row, column;
};

// Minus infinity in a score: kept only where no mask of the tile can do without. Each returns false, with the masks of the run left
// unfinished, when a score is NaN or plus infinity. 0 < n < m <= 32.
template <class X> struct TransposableTable {
    bool (*fast)(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m);
    bool (*exact)(const X* x, std::uint8_t* mask, TileRun run, std::size_t n, std::size_t m);
};
struct TransposableKernels {
    TransposableTable<float> f32;
    TransposableTable<double> f64;
};
RAREFY_EVERY_LEVEL(extern const TransposableKernels transposable)

enum class TileSolver { fast, exact, cover };

// Scores [rows, columns, positions], rows and columns multiples of m <= 32, tiles at every position by itself. The mask depends
// on the scores alone: not on the number of threads or the instruction set. Returns false when a score is NaN or plus infinity.
template <class X>
bool transposable(const X* x, std::size_t rows, std::size_t columns, std::size_t positions, std::size_t n, std::size_t m,
                  TileSolver solver, std::uint8_t* mask, std::size_t threads);

}  // namespace rarefy
