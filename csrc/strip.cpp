#include "strip.hpp"

#include <algorithm>
#include <array>
#include <numeric>

namespace rarefy {
namespace {

// Cuts the rows into contiguous ranges of about equal work, a row's work being its nonzeros and a little for itself.
std::vector<std::size_t> cut_rows(const Csr& w, std::size_t parts, std::size_t grain) {
    std::vector<std::size_t> first{0};
    const auto work = [&](std::size_t m) { return static_cast<std::size_t>(w.crow[m]) + 4 * m; };
    const std::size_t all = work(w.rows);
    for (std::size_t p = 1; p < parts; ++p) {
        const std::size_t target = all / parts * p;
        std::size_t low = first.back(), high = w.rows;
        while (low < high) {
            const std::size_t middle = (low + high) / 2;
            if (work(middle) < target) low = middle + 1;
            else high = middle;
        }
        low = std::min(w.rows, (low + grain / 2) / grain * grain);
        if (low > first.back() && low < w.rows) first.push_back(low);
    }
    first.push_back(w.rows);
    return first;
}

// Which patterns a column of each pattern is packed as. A run of a pattern that is short on average costs more by its badly
// predicted end than it saves in loads: its columns are packed as two smaller patterns, down to single rows.
using Splits = std::array<std::array<std::uint8_t, GROUP>, 16>;

// `least` columns a run are long enough.
Splits splits(std::array<std::size_t, 16> seen, std::size_t groups, std::size_t least) {
    Splits split{};
    std::array<bool, 16> kept{};
    std::array<std::array<std::uint8_t, 2>, 16> halves{};
    for (const unsigned bits : {4u, 3u, 2u, 1u})
        for (unsigned pattern = 1; pattern < 16; ++pattern) {
            if (static_cast<unsigned>(__builtin_popcount(pattern)) != bits) continue;
            kept[pattern] = bits == 1 || seen[pattern] >= least * groups;
            if (kept[pattern]) continue;
            // The half that is seen most often takes as many rows as it can, at most two.
            unsigned best = 0;
            for (unsigned half = 1; half < 16; ++half) {
                const bool fits = (half & pattern) == half && half != pattern && __builtin_popcount(half) <= 2;
                if (!fits) continue;
                const auto rows = [](unsigned p) { return __builtin_popcount(p); };
                if (best == 0 || rows(half) > rows(best) || (rows(half) == rows(best) && seen[half] > seen[best])) best = half;
            }
            halves[pattern] = {static_cast<std::uint8_t>(best), static_cast<std::uint8_t>(pattern & ~best)};
            for (const unsigned half : halves[pattern]) seen[half] += seen[pattern];
        }
    for (unsigned pattern = 1; pattern < 16; ++pattern) {
        std::size_t n = 0;
        const auto add = [&](const auto& self, unsigned p) -> void {
            if (kept[p]) split[pattern][n++] = static_cast<std::uint8_t>(p);
            else for (const unsigned half : halves[p]) self(self, half);
        };
        add(add, pattern);
    }
    return split;
}

// Where a row's nonzeros before input `end` end.
std::uint32_t row_end(const Csr& w, std::size_t row, std::uint32_t from, std::uint32_t end) {
    const std::int32_t* const last = w.col + w.crow[row + 1];
    return static_cast<std::uint32_t>(std::lower_bound(w.col + from, last, static_cast<std::int32_t>(end)) - w.col);
}

// The nonzeros of some rows in one block of the inputs: row m's are at [begin[m], end[m]) of the matrix.
struct RowRanges {
    const Csr& w;
    const std::vector<std::uint32_t>&begin, &end;
    std::uint32_t from;       // the block's first input
    std::size_t size;
};

// Orders the rows such that each GROUP of neighbours shares many columns: the fullest row that is left, and three times the one
// with most columns in common with those before. Among rows near each other, so that the time stays in proportion to the nonzeros.
std::vector<std::uint32_t> gather_alike(const RowRanges& r) {
    constexpr std::size_t MOST = 512, WORDS_A_NONZERO = 96;
    const std::size_t count = r.begin.size(), words = (r.size + 63) / 64;
    std::vector<std::uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0u);
    std::size_t nonzeros = 0;
    for (std::size_t m = 0; m < count; ++m) nonzeros += r.end[m] - r.begin[m];
    if (count <= GROUP || nonzeros == count * r.size) return order;
    const std::size_t near = std::min(MOST, WORDS_A_NONZERO * nonzeros / (count * words));
    if (near < 4 * GROUP) return order;
    std::vector<std::uint64_t> bits(near * words), shared(words);
    std::vector<std::uint32_t> left;
    for (std::size_t first = 0; first < count; first += near) {
        const std::size_t here = std::min(near, count - first);
        std::fill(bits.begin(), bits.end(), 0);
        for (std::size_t m = 0; m < here; ++m)
            for (std::uint32_t at = r.begin[first + m]; at < r.end[first + m]; ++at) {
                const std::uint32_t k = static_cast<std::uint32_t>(r.w.col[at]) - r.from;
                bits[m * words + k / 64] |= std::uint64_t{1} << k % 64;
            }
        left.resize(here);
        std::iota(left.begin(), left.end(), 0u);
        std::stable_sort(left.begin(), left.end(), [&](std::uint32_t a, std::uint32_t b) {
            return r.end[first + a] - r.begin[first + a] > r.end[first + b] - r.begin[first + b];
        });
        for (std::size_t done = 0; done < here; ++done) {
            std::uint32_t* const next = left.data() + done;
            if (done % GROUP == 0) {
                std::copy_n(bits.data() + *next * words, words, shared.data());
            } else {
                std::uint32_t* const best =
                    next + strip_kernels().most_alike(shared.data(), bits.data(), words, next, here - done);
                std::rotate(next, best, best + 1);
                for (std::size_t i = 0; i < words; ++i) shared[i] |= bits[*next * words + i];
            }
            order[first + done] = static_cast<std::uint32_t>(first) + *next;
        }
    }
    return order;
}

}  // namespace

Stream::Stream(const Csr& w, const std::vector<std::size_t>& ends, Packing packing, std::size_t parts, Words words)
    : packing_(packing), words_(words), ends_(ends), first_row_(cut_rows(w, std::max<std::size_t>(parts, 1), 16)) {
    const auto nnz = static_cast<std::size_t>(w.crow[w.rows]);
    offsets_.reserve(nnz);
    order_.reserve(nnz);
    sections_.reserve(this->parts() * blocks());
    for (std::size_t part = 0; part < this->parts(); ++part) {
        if (packing == Packing::groups) pack_groups(w, part);
        else pack_slices(w, part, packing == Packing::quads ? QUAD : SLICE);
    }
    if (w.position != nullptr)
        for (std::uint32_t& at : order_)
            if (at != NO_ROW) at = w.position[at];
    values_.resize(order_.size());
    if (w.values != nullptr) set_values(w.values);
}

void Stream::pack_groups(const Csr& w, std::size_t part) {
    struct Column {
        std::uint32_t k, at[GROUP];
        std::uint8_t pattern;
    };
    struct Group {
        std::array<std::uint16_t, 15> counts;
        std::uint32_t index;
        std::size_t column_at, columns, value_at, nonzeros;
    };
    const std::size_t first = first_row(part), count = rows(part), groups = (count + GROUP - 1) / GROUP;
    std::vector<std::uint32_t> next(count), stop(count);
    for (std::size_t m = 0; m < count; ++m) next[m] = static_cast<std::uint32_t>(w.crow[first + m]);
    std::vector<Group> found(groups);
    std::vector<Column> merged;               // of all groups, one after the other
    std::vector<std::size_t> group_end(groups);
    std::vector<std::uint16_t> offsets;
    std::vector<std::uint32_t> order;
    for (std::size_t block = 0; block < blocks(); ++block) {
        const auto from = static_cast<std::uint32_t>(block_first(block)), end = static_cast<std::uint32_t>(ends_[block]);
        merged.clear();
        for (std::size_t m = 0; m < count; ++m) stop[m] = row_end(w, first + m, next[m], end);
        const std::vector<std::uint32_t> members = gather_alike({w, next, stop, from, end - from});
        std::array<std::size_t, 16> seen{};
        for (std::size_t g = 0; g < groups; ++g) {
            const std::uint32_t* const row = members.data() + g * GROUP;
            const std::size_t here = std::min(GROUP, count - g * GROUP);
            for (;;) {  // merge the rows' columns
                std::uint32_t k = end;
                for (std::size_t r = 0; r < here; ++r)
                    if (next[row[r]] < stop[row[r]]) k = std::min(k, static_cast<std::uint32_t>(w.col[next[row[r]]]));
                if (k >= end) break;
                Column column{k, {}, 0};
                for (std::size_t r = 0; r < here; ++r) {
                    std::uint32_t& at = next[row[r]];
                    if (at < stop[row[r]] && static_cast<std::uint32_t>(w.col[at]) == k) {
                        column.pattern = static_cast<std::uint8_t>(column.pattern | 1u << r);
                        column.at[r] = at++;
                    }
                }
                ++seen[column.pattern];
                merged.push_back(column);
            }
            group_end[g] = merged.size();
        }
        // Alone in a loop a small matrix does better with shorter runs, which the branch predictor then remembers; in a network it
        // does not.
        const auto split = splits(seen, groups, 3);
        offsets.clear();
        order.clear();
        for (std::size_t g = 0; g < groups; ++g) {
            Group group{{}, static_cast<std::uint32_t>(g), offsets.size(), 0, order.size(), 0};
            for (std::uint8_t pattern = 1; pattern < 16; ++pattern)
                for (std::size_t c = g == 0 ? 0 : group_end[g - 1]; c < group_end[g]; ++c) {
                    const Column& column = merged[c];
                    const auto& use = split[column.pattern];
                    if (use[0] != pattern && use[1] != pattern && use[2] != pattern && use[3] != pattern) continue;
                    ++group.counts[pattern - 1u];
                    offsets.push_back(static_cast<std::uint16_t>(column.k - from));
                    for (std::size_t r = 0; r < GROUP; ++r)
                        if (pattern >> r & 1) order.push_back(column.at[r]);
                }
            group.columns = offsets.size() - group.column_at;
            group.nonzeros = order.size() - group.value_at;
            found[g] = group;
        }
        // Groups of like counts follow each other, so that the branch predictor is mostly right.
        std::stable_sort(found.begin(), found.end(), [](const Group& a, const Group& b) { return a.nonzeros < b.nonzeros; });
        sections_.push_back({counts_.size() / 15, offsets_.size(), order_.size(), groups});
        for (const Group& group : found) {
            counts_.insert(counts_.end(), group.counts.begin(), group.counts.end());
            for (std::size_t r = 0; r < GROUP; ++r) {
                const std::size_t place = group.index * GROUP + r;
                rows_.push_back(place < count ? members[place] : NO_ROW);
            }
            const auto copy = [](auto& to, const auto& all, std::size_t at, std::size_t n) {
                const auto begin = all.begin() + static_cast<std::ptrdiff_t>(at);
                to.insert(to.end(), begin, begin + static_cast<std::ptrdiff_t>(n));
            };
            copy(offsets_, offsets, group.column_at, group.columns);
            copy(order_, order, group.value_at, group.nonzeros);
        }
    }
}

void Stream::pack_slices(const Csr& w, std::size_t part, std::size_t height) {
    const std::size_t first = first_row(part), count = rows(part), slices = (count + height - 1) / height;
    std::vector<std::uint32_t> next(count), stop(count), by_length(count);
    for (std::size_t m = 0; m < count; ++m) next[m] = static_cast<std::uint32_t>(w.crow[first + m]);
    for (std::size_t block = 0; block < blocks(); ++block) {
        const auto from = static_cast<std::uint32_t>(block_first(block)), end = static_cast<std::uint32_t>(ends_[block]);
        for (std::size_t m = 0; m < count; ++m) stop[m] = row_end(w, first + m, next[m], end);
        std::iota(by_length.begin(), by_length.end(), 0u);
        std::stable_sort(by_length.begin(), by_length.end(),
                         [&](std::uint32_t a, std::uint32_t b) { return stop[a] - next[a] < stop[b] - next[b]; });
        sections_.push_back({counts_.size(), offsets_.size(), order_.size(), slices});
        const std::uint32_t zeros = end - from;  // the strip's last row
        for (std::size_t s = 0; s < slices; ++s) {
            std::uint32_t steps = 0;
            for (std::size_t r = 0; r < height; ++r) {
                const std::size_t at = s * height + r;
                rows_.push_back(at < count ? by_length[at] : NO_ROW);
                if (at < count) steps = std::max(steps, stop[by_length[at]] - next[by_length[at]]);
            }
            counts_.push_back(static_cast<std::uint16_t>(steps));
            for (std::uint32_t step = 0; step < steps; ++step)
                for (std::size_t r = 0; r < height; ++r) {
                    const std::size_t place = s * height + r;
                    const std::uint32_t m = place < count ? by_length[place] : 0;
                    const bool used = place < count && next[m] + step < stop[m];
                    const std::uint32_t at = used ? next[m] + step : NO_ROW;
                    const std::uint32_t k = used ? static_cast<std::uint32_t>(w.col[at]) : 0;
                    offsets_.push_back(static_cast<std::uint16_t>(used ? k - from : zeros));
                    order_.push_back(at);
                }
        }
        std::copy(stop.begin(), stop.end(), next.begin());
    }
}

void Stream::set_values(const float* values) {
    for (std::size_t i = 0; i < order_.size(); ++i) values_[i] = order_[i] == NO_ROW ? 0.0f : values[order_[i]];
}

std::size_t Stream::bytes() const {
    return 2 * (counts_.size() + offsets_.size()) + 4 * (rows_.size() + order_.size() + values_.size());
}

void Stream::run(std::size_t part, std::size_t block, const char* x, std::size_t stride, std::size_t vectors,
                 const StripTarget& target) const {
    const Section& s = sections_[part * blocks() + block];
    const StripLoops& k = strip_loops(words_);
    if (packing_ == Packing::groups) {
        k.groups[vectors]({counts_.data() + s.group * 15, rows_.data() + s.group * GROUP, s.groups, offsets_.data() + s.offset,
                           values_.data() + s.value},
                          x, stride, target);
    } else {
        // counts_ holds one number a slice here, rows_ as many as it is high
        const bool quads = packing_ == Packing::quads;
        (quads ? k.quads : k.slices)[vectors]({counts_.data() + s.group, rows_.data() + s.group * (quads ? QUAD : SLICE), s.groups,
                                               offsets_.data() + s.offset, values_.data() + s.value},
                                              x, stride, target);
    }
}

}  // namespace rarefy
