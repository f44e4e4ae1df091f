#include "spmv.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

float activated(float x, Act act) {
    switch (act) {
        case Act::none: return x;
        case Act::relu: return x > 0 ? x : (x == x ? 0.0f : x);
        case Act::relu6: return x > 6 ? 6.0f : activated(x, Act::relu);
        case Act::hardswish: return x * std::min(std::max(x + 3.0f, 0.0f), 6.0f) / 6.0f;
        case Act::silu: return x / (1.0f + std::exp(-x));
        case Act::sigmoid: return 1.0f / (1.0f + std::exp(-x));
        case Act::hardsigmoid: return std::min(std::max(x + 3.0f, 0.0f), 6.0f) / 6.0f;
    }
    return x;
}

}  // namespace

Spmv::Spmv(const Csr& w) : rows_(w.rows), cols_(w.cols), segments_((w.cols + SEGMENT - 1) / SEGMENT) {
    // Rows of like length share a slice.
    std::vector<std::uint32_t> by_length(rows_);
    std::iota(by_length.begin(), by_length.end(), 0u);
    std::stable_sort(by_length.begin(), by_length.end(), [&](std::uint32_t a, std::uint32_t b) {
        return w.crow[a + 1] - w.crow[a] < w.crow[b + 1] - w.crow[b];
    });
    struct Entry {
        std::uint32_t steps, column, from[SLICE_ROWS], to[SLICE_ROWS];
    };
    std::vector<Entry> entries;
    for (std::size_t s = 0; s < rows_; s += SLICE_ROWS) {
        slices_.push_back({first_.size(), index_.size() / SLICE_ROWS});
        const std::size_t here = std::min(SLICE_ROWS, rows_ - s);
        std::uint32_t next[SLICE_ROWS] = {}, end[SLICE_ROWS] = {};
        for (std::size_t r = 0; r < SLICE_ROWS; ++r) {
            row_.push_back(r < here ? by_length[s + r] : NO_ROW);
            if (r >= here) continue;
            next[r] = static_cast<std::uint32_t>(w.crow[by_length[s + r]]);
            end[r] = static_cast<std::uint32_t>(w.crow[by_length[s + r] + 1]);
        }
        entries.clear();
        for (;;) {
            // The next segment that any row has a weight in, or the rest of a very full one.
            std::uint32_t column = NO_ROW;
            for (std::size_t r = 0; r < here; ++r)
                if (next[r] < end[r]) column = std::min(column, static_cast<std::uint32_t>(w.col[next[r]]));
            if (column == NO_ROW) break;
            Entry entry{0, static_cast<std::uint32_t>(column / SEGMENT * SEGMENT), {}, {}};
            for (std::size_t r = 0; r < here; ++r) {
                entry.from[r] = entry.to[r] = next[r];
                while (entry.to[r] < end[r] && entry.to[r] - entry.from[r] < LONGEST &&
                       static_cast<std::uint32_t>(w.col[entry.to[r]]) < entry.column + SEGMENT)
                    ++entry.to[r];
                next[r] = entry.to[r];
                entry.steps = std::max(entry.steps, entry.to[r] - entry.from[r]);
            }
            entries.push_back(entry);
        }
        std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.steps < b.steps; });
        const std::size_t base = classes_.size();
        classes_.resize(base + LONGEST + 1);
        for (const Entry& entry : entries) {
            ++classes_[base + entry.steps];
            first_.push_back(entry.column);
            for (std::uint32_t step = 0; step < entry.steps; ++step)
                for (std::size_t r = 0; r < SLICE_ROWS; ++r) {
                    const std::uint32_t at = entry.from[r] + step;
                    const bool used = at < entry.to[r];
                    order_.push_back(used ? (w.position == nullptr ? at : w.position[at]) : NO_ROW);
                    index_.push_back(used ? static_cast<std::uint8_t>(static_cast<std::uint32_t>(w.col[at]) - entry.column) : 0);
                }
        }
    }
    slices_.push_back({first_.size(), index_.size() / SLICE_ROWS});
    values_.resize(order_.size());
    if (w.values != nullptr) set_values(w.values);
}

void Spmv::set_values(const float* values) {
    for (std::size_t i = 0; i < order_.size(); ++i) values_[i] = order_[i] == NO_ROW ? 0.0f : values[order_[i]];
}

std::size_t Spmv::bytes() const {
    return index_.size() + 4 * (classes_.size() + row_.size() + first_.size() + order_.size() + values_.size());
}

void Spmv::run(const float* x, float* y, const float* bias, Act act, std::size_t threads) const {
    const VectorKernels& k = RAREFY_AT_LEVEL(vector_product);
    const std::size_t slices = slices_.size() - 1;
    if (cols_ % SEGMENT != 0) {  // the last segment is read whole
        float* const padded = scratch(0, segments_ * SEGMENT);
        std::memcpy(padded, x, cols_ * sizeof(float));
        std::fill(padded + cols_, padded + segments_ * SEGMENT, 0.0f);
        x = padded;
    }
    const auto work = [&](std::size_t from, std::size_t to) {
        for (std::size_t s = from; s < to; ++s) {
            const std::size_t step = slices_[s].step * SLICE_ROWS;
            float sums[SLICE_ROWS];
            k.slice({classes_.data() + s * (LONGEST + 1), first_.data() + slices_[s].entry, index_.data() + step, values_.data() + step},
                    x, sums);
            const std::uint32_t* rows = row_.data() + s * SLICE_ROWS;
            for (std::size_t r = 0; r < SLICE_ROWS && rows[r] != NO_ROW; ++r)
                y[rows[r]] = activated(sums[r] + (bias == nullptr ? 0.0f : bias[rows[r]]), act);
        }
    };
    const std::size_t all = slices_.back().step;
    const std::size_t pieces = all < 2048 ? 1 : threads;
    // Slices of about equal work for each thread.
    const auto cut = [&](std::size_t piece) {
        if (piece == pieces) return slices;
        return static_cast<std::size_t>(std::lower_bound(slices_.begin(), slices_.end() - 1, all * piece / pieces,
                                                         [](const Slice& s, std::size_t step) { return s.step < step; }) -
                                        slices_.begin());
    };
    parallel(pieces, threads, [&](std::size_t piece) { work(cut(piece), cut(piece + 1)); });
}

}  // namespace rarefy
