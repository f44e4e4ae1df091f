#include "spmm.hpp"

#include <algorithm>
#include <cstring>

#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

constexpr std::size_t TILE_BYTES = std::size_t{768} << 10;  // partial sums stay in the second cache
constexpr std::size_t FEW_USES = 8;  // nonzeros an input up to which packing an activation costs more than it saves

// How many vectors a tile has, where there are columns enough, and at most.
std::size_t usual_vectors(Packing packing) {
    const std::size_t most = packing == Packing::slices ? MOST_SLICE_VECTORS : 3;
    return std::min(most, strip_kernels().vectors[static_cast<int>(packing)]);
}
std::size_t most_vectors(Packing packing) {
    const std::size_t usual = usual_vectors(packing);
    return packing == Packing::slices ? usual : std::min(usual + 1, strip_kernels().vectors[static_cast<int>(packing)]);
}

double density_of(const Csr& w) {
    const double all = static_cast<double>(w.rows) * static_cast<double>(w.cols);
    return all == 0 ? 1.0 : std::max(static_cast<double>(w.crow[w.rows]) / all, 1e-6);
}

// How many of four neighbouring rows use a column that any of them uses, on average.
double rows_sharing(const Csr& w) {
    std::vector<std::uint32_t> last(w.cols, NO_ROW);  // the group that used a column last
    std::size_t columns = 0;
    for (std::size_t m = 0; m < w.rows; ++m)
        for (auto i = static_cast<std::size_t>(w.crow[m]); i < static_cast<std::size_t>(w.crow[m + 1]); ++i) {
            std::uint32_t& group = last[static_cast<std::size_t>(w.col[i])];
            columns += group != m / GROUP;
            group = static_cast<std::uint32_t>(m / GROUP);
        }
    return columns == 0 ? 0 : static_cast<double>(w.crow[w.rows]) / static_cast<double>(columns);
}

// Where rows share columns (dense weights, blocks), one load serves several. Where they do not, four rows in step have no branches
// to predict. And where hardly any row uses a column, activations are read where they lie, which only the first can.
Packing packing_for(const Csr& w, std::size_t columns) {
    if (columns <= MOST_SLICE_VECTORS * strip_kernels().lanes) return Packing::slices;
    const bool packs = static_cast<std::size_t>(w.crow[w.rows]) > FEW_USES * w.cols;
    return packs && rows_sharing(w) < 1.4 ? Packing::quads : Packing::groups;  // random zeros: from 78 % on
}

// A block's strip fits the first cache; where the weights are so sparse that a row has few nonzeros in it, loading and storing
// the partial sums would cost more than the second cache does, and blocks are longer.
std::vector<std::size_t> block_ends(const Csr& w, std::size_t columns, Packing packing) {
    const std::size_t lanes = strip_kernels().lanes;
    const std::size_t vectors = std::clamp<std::size_t>((columns + lanes - 1) / lanes, 1, usual_vectors(packing));
    const bool quads = packing == Packing::quads;
    const std::size_t fits = l1_bytes() * 9 / 8 / (vectors * lanes * sizeof(float));  // measured: a little over is best
    const double full_enough = (quads ? 25.0 : 9.0) / density_of(w);
    std::size_t size = std::max(fits, static_cast<std::size_t>(full_enough));
    size = std::clamp<std::size_t>(size, 16, LONGEST_BLOCK);
    const std::size_t over = quads ? size * 3 / 4 : size - 1;
    std::size_t blocks = std::max<std::size_t>(1, (w.cols + over) / size);
    blocks = std::max(blocks, (w.cols + LONGEST_BLOCK - 1) / LONGEST_BLOCK);
    std::vector<std::size_t> ends;
    for (std::size_t b = 1; b <= blocks; ++b) ends.push_back(w.cols * b / blocks);
    return ends;
}

// So many parts that each one's partial sums fit the second cache; but every part packs its own strips, which must pay.
std::size_t fitting_parts(const Csr& w, Packing packing) {
    const std::size_t bytes = w.rows * usual_vectors(packing) * strip_kernels().lanes * sizeof(float);
    const std::size_t pay = static_cast<std::size_t>(w.crow[w.rows]) / (8 * std::max<std::size_t>(w.cols, 1));
    return std::clamp<std::size_t>((bytes + TILE_BYTES - 1) / TILE_BYTES, 1, std::max<std::size_t>(pay, 1));
}

std::size_t parts_for(const Csr& w, std::size_t threads, Packing packing) {
    return std::max<std::size_t>(fitting_parts(w, packing), threads > 1 && w.rows >= 32 ? threads : 1);
}

}  // namespace

Spmm::Spmm(const Csr& w, std::size_t columns, std::size_t threads, For use, Words words)
    : rows_(w.rows), cols_(w.cols), nnz_(static_cast<std::size_t>(w.crow[w.rows])) {
    if (use == For::linear_only && columns == 1 && words == Words::float32) {
        vector_.emplace(w);
        return;
    }
    const Packing packing = packing_for(w, columns);
    fits_ = fitting_parts(w, packing) == 1;
    stream_.emplace(w, block_ends(w, columns, packing), packing, parts_for(w, threads, packing), words);
}

// Cuts the columns into tiles of nearly equal width and, where these are too few for the threads, the rows too.
void Spmm::tiles(std::size_t columns, std::size_t threads, const std::function<void(const Task&)>& work) const {
    const std::size_t lanes = strip_kernels().lanes, vectors = (columns + lanes - 1) / lanes;
    const std::size_t usual = usual_vectors(stream_->packing()), most = most_vectors(stream_->packing());
    std::size_t count = (vectors + most - 1) / most;
    const bool few = vectors <= 2 * most && stream_->packing() == Packing::groups;  // then as few tiles as can be
    if (!few) count = std::max(count, (vectors + usual / 2) / usual);
    count = std::max<std::size_t>(count, 1);
    const std::size_t parts = stream_->parts();
    const bool whole = fits_ && (threads <= 1 || count >= 3 * threads || parts == 1);
    const std::size_t chunks = whole ? 1 : parts;
    parallel(count * chunks, threads, [&](std::size_t i) {
        const std::size_t tile = i / chunks, chunk = i % chunks;
        const std::size_t from = vectors * tile / count, to = vectors * (tile + 1) / count;
        const std::size_t part = whole ? 0 : chunk, part_end = whole ? parts : chunk + 1;
        const std::size_t first = stream_->first_row(part);
        work({part, part_end, from * lanes, std::min(columns, to * lanes) - from * lanes, to - from, first,
              stream_->first_row(part_end - 1) + stream_->rows(part_end - 1) - first});
    });
}

float* Spmm::strip_scratch(std::size_t vectors) const {
    std::size_t longest = 0;
    for (std::size_t b = 0; b < stream_->blocks(); ++b) longest = std::max(longest, stream_->block_size(b));
    return scratch(0, (longest + 1) * vectors * strip_kernels().lanes);
}

bool Spmm::joins(std::size_t batch, std::size_t pixels) const {
    const std::size_t tile = 4 * strip_kernels().lanes;
    return batch > 1 && pixels < 4 * tile && pixels % tile != 0;
}

void Spmm::product(const Pack& pack, const Out& out, std::size_t threads) const {
    const StripKernels& k = strip_kernels();
    const std::size_t lanes = k.lanes, pixels = out.pixels;
    if (out.batch == 0 || pixels == 0 || rows_ == 0) return;
    const std::size_t images = out.joined ? 1 : out.batch;
    // Enough images: a thread takes whole ones. Few: the threads share out each image's tiles.
    const bool apart = threads > 1 && (images >= 4 * threads || (images >= threads && images % threads == 0));
    const std::size_t inside = apart ? 1 : threads;
    parallel(images, apart ? threads : 1, [&](std::size_t image) {
        float* const y = out.y + image * out.image_step;
        const float* const residual = out.residual == nullptr ? nullptr : out.residual + image * out.image_step;
        tiles(out.joined ? out.batch * pixels : pixels, inside, [&](const Task& t) {
            const std::size_t width = t.vectors * lanes, tail = t.columns - (t.vectors - 1) * lanes;
            float* const strip = strip_scratch(t.vectors);
            const bool direct = stream_->blocks() == 1 && !out.joined;
            float* const sums = direct ? nullptr : scratch(1, t.rows * width + lanes);
            for (std::size_t b = 0; b < stream_->blocks(); ++b) {
                const std::size_t size = stream_->block_size(b);
                const Place place = pack(image, t, stream_->block_first(b), size, strip, width);
                if (in_step(stream_->packing())) std::fill(strip + size * width, strip + (size + 1) * width, 0.0f);
                for (std::size_t part = t.part; part < t.part_end; ++part) {
                    const std::size_t row = stream_->first_row(part);
                    float* const partial = direct ? nullptr : sums + (row - t.row) * width;
                    StripTarget target{b == 0 ? nullptr : partial, width, partial, width, lanes, nullptr};
                    Epilogue epilogue;
                    if (b + 1 == stream_->blocks() && !out.joined) {
                        const std::size_t to = row * pixels + t.column;
                        epilogue = {out.bias == nullptr ? nullptr : out.bias + row, residual == nullptr ? nullptr : residual + to,
                                    pixels, out.act};
                        target.to = y + to;
                        target.to_ld = pixels;
                        target.tail = tail;
                        if (!epilogue.empty()) target.epilogue = &epilogue;
                    }
                    stream_->run(part, b, place.at, place.stride, t.vectors, target);
                }
            }
            if (out.joined)
                pieces(t, pixels, [&](std::size_t i, std::size_t p, std::size_t c, std::size_t n) {
                    const std::size_t to = i * out.image_step + t.row * pixels + p;
                    const Epilogue epilogue{out.bias == nullptr ? nullptr : out.bias + t.row,
                                            out.residual == nullptr ? nullptr : out.residual + to, pixels, out.act};
                    k.unpack(sums + c, width, t.rows, n, out.y + to, pixels, epilogue);
                });
        });
    });
}

void Spmm::planes(const float* x, std::size_t batch, std::size_t pixels, float* y, const float* bias, const float* residual,
                  Act act, std::size_t threads) const {
    const StripKernels& k = strip_kernels();
    const bool joined = joins(batch, pixels);
    // Reading activations where they lie saves the packing, which few nonzeros an input do not pay for; but planes whose distance
    // is a multiple of a large power of two fall into the same few lines of the cache.
    const std::size_t uses = nnz_ / std::max<std::size_t>(cols_, 1), distance = pixels * sizeof(float);
    const bool in_place = stream_->packing() == Packing::groups && uses <= FEW_USES && distance % 1024 != 0;
    const Pack whole = [&](std::size_t image, const Task& t, std::size_t first, std::size_t size, float* strip, std::size_t width) {
        const float* const from = x + (image * cols_ + first) * pixels + t.column;
        if (in_place && t.columns == width) return Place{reinterpret_cast<const char*>(from), distance};
        k.pack(from, pixels, size, t.columns, strip, width);
        return Place{reinterpret_cast<const char*>(strip), width * sizeof(float)};
    };
    const Pack pieced = [&](std::size_t, const Task& t, std::size_t first, std::size_t size, float* strip, std::size_t width) {
        pieces(t, pixels, [&](std::size_t i, std::size_t p, std::size_t c, std::size_t n) {
            const float* from = x + (i * cols_ + first) * pixels + p;
            for (std::size_t j = 0; j < size; ++j) std::memcpy(strip + j * width + c, from + j * pixels, n * sizeof(float));
        });
        if (t.columns < width)
            for (std::size_t j = 0; j < size; ++j) std::fill(strip + j * width + t.columns, strip + (j + 1) * width, 0.0f);
        return Place{reinterpret_cast<const char*>(strip), width * sizeof(float)};
    };
    product(joined ? pieced : whole, {y, bias, residual, act, batch, pixels, rows_ * pixels, joined}, threads);
}

void Spmm::linear(const float* x, std::size_t x_ld, std::size_t n, float* y, std::size_t y_ld, const float* bias, Act act,
                  std::size_t threads, const Finish& finish) const {
    const StripKernels& k = strip_kernels();
    const std::size_t lanes = k.lanes;
    if (n == 0 || rows_ == 0) return;
    if (vector_) {
        for (std::size_t i = 0; i < n; ++i) vector_->run(x + i * x_ld, y + i * y_ld, bias, act, threads);
        return;
    }
    tiles(n, threads, [&](const Task& t) {
        const std::size_t width = t.vectors * lanes;
        float* const strip = strip_scratch(t.vectors);
        float* const sums = scratch(1, t.rows * width);
        for (std::size_t b = 0; b < stream_->blocks(); ++b) {
            const std::size_t first = stream_->block_first(b), size = stream_->block_size(b);
            k.pack_transposed(x + t.column * x_ld + first, x_ld, size, t.columns, strip, width);
            if (in_step(stream_->packing())) std::fill(strip + size * width, strip + (size + 1) * width, 0.0f);
            for (std::size_t part = t.part; part < t.part_end; ++part) {
                float* const partial = sums + (stream_->first_row(part) - t.row) * width;
                stream_->run(part, b, reinterpret_cast<const char*>(strip), width * sizeof(float), t.vectors,
                            {b == 0 ? nullptr : partial, width, partial, width, lanes, nullptr});
            }
        }
        if (finish) finish(sums, t.row, t.rows, width);
        k.unpack_transposed(sums, width, t.rows, t.columns, y + t.column * y_ld + t.row, y_ld,
                            bias == nullptr ? nullptr : bias + t.row, act);
    });
}

}  // namespace rarefy
