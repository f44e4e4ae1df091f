#include "n_m.hpp"

#include <algorithm>
#include <atomic>
#include <functional>

#include "pool.hpp"
#include "scratch.hpp"

namespace rarefy {
namespace {

constexpr std::size_t T = NM_TILE;
constexpr std::size_t CACHED = std::size_t{384} << 10;  // bytes of weights, and of activations, that meet in the second cache
constexpr std::size_t DOT_SAMPLES = 64, MOST_PANELS = 6;  // so many tiles of inputs, of so many samples, stay in the first cache

std::size_t up(std::size_t n, std::size_t by) { return (n + by - 1) / by; }

// One tile while its weights are shared out over steps: which input each output takes in each step, and the other way round.
class TileSteps {
public:
    explicit TileSteps(std::size_t steps) : steps_(steps), all_(static_cast<std::uint32_t>((std::uint64_t{1} << steps) - 1)) {
        for (auto& lanes : col_) std::fill(lanes, lanes + T, NONE);
        for (auto& lanes : row_) std::fill(lanes, lanes + T, NONE);
        std::fill(free_row_, free_row_ + T, all_);
        std::fill(free_col_, free_col_ + T, all_);
    }

    // The next step of row r; columns may meet.
    bool append(std::size_t r, std::size_t c) {
        if (free_row_[r] == 0) return false;
        const auto step = static_cast<std::size_t>(__builtin_ctz(free_row_[r]));
        free_row_[r] &= free_row_[r] - 1;
        col_[step][r] = static_cast<std::uint8_t>(c);
        return true;
    }

    // A step where neither the row nor the column has a weight; where there is none, those in the way change steps (Koenig's proof).
    bool match(std::size_t r, std::size_t c) {
        if (free_row_[r] == 0 || free_col_[c] == 0) return false;
        std::uint32_t both = free_row_[r] & free_col_[c];
        if (both == 0) {
            const auto a = static_cast<std::size_t>(__builtin_ctz(free_row_[r])), b = static_cast<std::size_t>(__builtin_ctz(free_col_[c]));
            exchange(c, a, b);
            both = free_row_[r] & free_col_[c];
        }
        put(r, c, static_cast<std::size_t>(__builtin_ctz(both)));
        return true;
    }

    void write(bool both, std::int32_t* index, std::uint16_t* used) {
        std::fill(index, index + up(steps_, NM_LINE) * T, 0);
        for (std::size_t step = 0; step < steps_; ++step) {
            used[step] = 0;
            for (std::size_t r = 0; r < T; ++r)
                if (col_[step][r] != NONE) used[step] = static_cast<std::uint16_t>(used[step] | 1u << r);
            if (both) complete(step);
            const std::size_t shift = step % NM_LINE * 4;
            for (std::size_t i = 0; i < T; ++i) {
                std::int32_t& word = index[step / NM_LINE * T + i];
                const std::uint32_t c = col_[step][i] == NONE ? 0u : col_[step][i], r = row_[step][i] == NONE ? 0u : row_[step][i];
                word = static_cast<std::int32_t>(static_cast<std::uint32_t>(word) | c << shift | r << (16 + shift));
            }
        }
    }

private:
    static constexpr std::uint8_t NONE = 255;

    void put(std::size_t r, std::size_t c, std::size_t step) {
        col_[step][r] = static_cast<std::uint8_t>(c);
        row_[step][c] = static_cast<std::uint8_t>(r);
        free_row_[r] &= ~(1u << step);
        free_col_[c] &= ~(1u << step);
    }

    // Along the path from column c whose edges are in step a, b, a, ...: they change to the other one.
    void exchange(std::size_t c, std::size_t a, std::size_t b) {
        std::size_t edges[2 * T][2], n = 0;
        for (std::size_t step = a;; step = a + b - step) {
            const std::uint8_t r = row_[step][c];
            if (r == NONE) break;
            edges[n][0] = r;
            edges[n++][1] = c;
            step = a + b - step;
            if (col_[step][r] == NONE) break;
            c = col_[step][r];
            edges[n][0] = r;
            edges[n++][1] = c;
        }
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t step = i % 2 == 0 ? a : b, r = edges[i][0], col = edges[i][1];
            col_[step][r] = row_[step][col] = NONE;
            free_row_[r] |= 1u << step;
            free_col_[col] |= 1u << step;
        }
        for (std::size_t i = 0; i < n; ++i) put(edges[i][0], edges[i][1], i % 2 == 0 ? b : a);
    }

    // Outputs and inputs that a step leaves out are paired in order, so that it is a permutation.
    void complete(std::size_t step) {
        std::size_t r = 0;
        for (std::size_t c = 0; c < T; ++c) {
            if (row_[step][c] != NONE) continue;
            while (col_[step][r] != NONE) ++r;
            col_[step][r] = static_cast<std::uint8_t>(c);
            row_[step][c] = static_cast<std::uint8_t>(r);
        }
    }

    std::size_t steps_;
    std::uint32_t all_;
    std::uint8_t col_[T][T], row_[T][T];  // [step][output], [step][input]
    std::uint32_t free_row_[T], free_col_[T];
};

// Every tile of the weight, shared out over the threads by rows of tiles.
void each_tile(const NMShape& s, std::size_t threads, const std::function<void(std::size_t tile, std::size_t row, std::size_t col)>& task) {
    parallel(s.row_tiles(), threads, [&](std::size_t r) {
        for (std::size_t c = 0; c < s.col_tiles(); ++c) task(r * s.col_tiles() + c, r * T, c * T);
    });
}

// Where tiles of outputs [first, first + count) have their weights.
struct Panel {
    const float* values;
    const std::int32_t* index;
    std::size_t value_step, index_step;
};
using GetPanel = std::function<Panel(std::size_t first, std::size_t count)>;

// y [n][outputs] from x [n][inputs]. A block of outputs' weights and a block of samples both stay in the second cache while they meet.
void product(std::size_t inputs, std::size_t outputs, std::size_t steps, const GetPanel& panel, const float* x, std::size_t n,
             const float* bias, Act act, float* y, std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    if (n == 0 || outputs == 0) return;
    const std::size_t in_tiles = up(inputs, T), out_tiles = up(outputs, T), pairs = up(out_tiles, NM_OUTPUTS), groups = up(n, NM_SAMPLES);
    const std::size_t pair_bytes = in_tiles * NM_OUTPUTS * T * 4 * (steps + up(steps, NM_LINE));
    const std::size_t group_bytes = std::max<std::size_t>(1, inputs) * NM_SAMPLES * 4;
    const std::size_t block = std::clamp<std::size_t>(CACHED / std::max<std::size_t>(1, pair_bytes), 1, pairs);
    const std::size_t chunk = std::clamp<std::size_t>(CACHED / group_bytes, 1, groups);
    // Threads take samples of their own where there are enough of them, else outputs.
    const bool by_samples = groups >= 2 * threads;
    const Cuts samples{groups, 1, by_samples ? threads : 1}, rows{pairs, 1, by_samples ? 1 : threads};
    parallel(threads, threads, [&](std::size_t t) {
        const std::size_t first_group = samples(by_samples ? t : 0), end_group = samples(by_samples ? t + 1 : 1);
        const std::size_t first_pair = rows(by_samples ? 0 : t), end_pair = rows(by_samples ? 1 : t + 1);
        for (std::size_t p = first_pair; p < end_pair; p += block) {
            const std::size_t end = std::min(end_pair, p + block), first = p * NM_OUTPUTS;
            const std::size_t count = std::min(out_tiles, end * NM_OUTPUTS) - first;
            if (first_group == end_group) break;
            const Panel w = panel(first, count);
            for (std::size_t g = first_group; g < end_group; g += chunk)
                for (std::size_t o = 0; o < count; o += NM_OUTPUTS) {
                    const std::size_t tiles = std::min(NM_OUTPUTS, count - o), at = (first + o) * T;
                    const NMRun run{w.values + o * w.value_step, w.index + o * w.index_step, w.value_step, w.index_step, in_tiles,
                                    inputs - (in_tiles - 1) * T, steps, bias == nullptr ? nullptr : bias + at, act,
                                    std::min(T, outputs - at - (tiles - 1) * T)};
                    for (std::size_t s = g; s < std::min(end_group, g + chunk); ++s) {
                        const std::size_t sample = s * NM_SAMPLES, here = std::min(NM_SAMPLES, n - sample);
                        k.product(run, tiles, here, x + sample * inputs, inputs, y + sample * outputs + at, outputs);
                    }
                }
        }
    });
}

// Measured. Without AVX-512 a tile's inputs are not permuted by one instruction, and strips win as soon as they are wide enough.
bool by_strips(std::size_t n) { return !RAREFY_AT_LEVEL(n_m).permutes && n >= 2 * NM_SAMPLES; }

}  // namespace

bool n_m_index(const std::uint8_t* mask, const NMShape& s, bool both, std::int32_t* index, std::uint16_t* used, std::size_t threads) {
    std::atomic<bool> fits{true};
    each_tile(s, threads, [&](std::size_t tile, std::size_t row, std::size_t col) {
        TileSteps t(s.steps);
        for (std::size_t r = 0; r < std::min(T, s.rows - row); ++r)
            for (std::size_t c = 0; c < std::min(T, s.cols - col); ++c)
                if (mask[(row + r) * s.cols + col + c] != 0 && !(both ? t.match(r, c) : t.append(r, c))) fits = false;
        t.write(both, index + tile * s.lines() * T, used + tile * s.steps);
    });
    return fits;
}

void n_m_gather(const NMWeight& w, const float* weight, float* values, std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    const NMShape& s = w.shape;
    each_tile(s, threads, [&](std::size_t tile, std::size_t row, std::size_t col) {
        k.gather(weight + row * s.cols + col, s.cols, std::min(T, s.rows - row), std::min(T, s.cols - col),
                 w.index + tile * s.lines() * T, w.used + tile * s.steps, s.steps, values + tile * s.steps * T);
    });
}

void n_m_scatter(const NMWeight& w, float* weight, std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    const NMShape& s = w.shape;
    parallel(s.row_tiles(), threads, [&](std::size_t r) {
        std::fill(weight + r * T * s.cols, weight + std::min(s.rows, (r + 1) * T) * s.cols, 0.0f);
        for (std::size_t c = 0, tile = r * s.col_tiles(); c < s.col_tiles(); ++c, ++tile)
            k.scatter(w.values + tile * s.steps * T, w.index + tile * s.lines() * T, w.used + tile * s.steps, s.steps,
                      weight + r * T * s.cols + c * T, s.cols, std::min(T, s.rows - r * T), std::min(T, s.cols - c * T));
    });
}

void n_m_by_tiles(const NMWeight& w, bool inverse, const float* x, std::size_t n, const float* bias, Act act, float* y,
                  std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    const NMShape& s = w.shape;
    const std::size_t value_tile = s.steps * T, index_tile = s.lines() * T;
    if (!inverse) {
        const std::size_t value_step = s.col_tiles() * value_tile, index_step = s.col_tiles() * index_tile;
        const GetPanel panel = [&](std::size_t first, std::size_t) {
            return Panel{w.values + first * value_step, w.index + first * index_step, value_step, index_step};
        };
        return product(s.cols, s.rows, s.steps, panel, x, n, bias, act, y, threads);
    }
    // A block of the transposed weight is made for the time of its use.
    const GetPanel panel = [&](std::size_t first, std::size_t count) {
        const std::size_t tiles = count * s.row_tiles();
        float* const values = scratch(0, tiles * (value_tile + index_tile));
        auto* const index = reinterpret_cast<std::int32_t*>(values + tiles * value_tile);
        for (std::size_t r = 0; r < s.row_tiles(); ++r)
            for (std::size_t c = 0; c < count; ++c) {
                const std::size_t from = r * s.col_tiles() + first + c, to = c * s.row_tiles() + r;
                k.turn(w.values + from * value_tile, w.index + from * index_tile, s.steps, values + to * value_tile,
                       index + to * index_tile);
            }
        return Panel{values, index, s.row_tiles() * value_tile, s.row_tiles() * index_tile};
    };
    product(s.rows, s.cols, s.steps, panel, x, n, bias, act, y, threads);
}

void n_m_forward(const NMWeight& w, const float* x, std::size_t n, const float* bias, Act act, float* y, std::size_t threads) {
    (by_strips(n) ? n_m_by_strips : n_m_by_tiles)(w, false, x, n, bias, act, y, threads);
}

void n_m_input_gradient(const NMWeight& w, const float* dy, std::size_t n, float* dx, std::size_t threads) {
    (by_strips(n) ? n_m_by_strips : n_m_by_tiles)(w, true, dy, n, nullptr, Act::none, dx, threads);
}

void n_m_values_gradient(const NMWeight& w, const float* x, const float* dy, std::size_t n, float* out, std::size_t threads) {
    const NMKernels& k = RAREFY_AT_LEVEL(n_m);
    const NMShape& s = w.shape;
    const std::size_t value_tile = s.steps * T, index_tile = s.lines() * T;
    const std::size_t group = std::clamp<std::size_t>(NM_DOTS / s.steps, 1, MOST_PANELS);
    if (n == 0) std::fill(out, out + s.values(), 0.0f);
    // [tiles][samples][T], each panel a line longer than it is, so that panels do not share the lines of a cache set
    const auto panels = [](const float* from, std::size_t width, std::size_t first, std::size_t tiles, std::size_t sample,
                           std::size_t samples, float* to) {
        for (std::size_t i = 0; i < samples; ++i)
            for (std::size_t t = 0; t < tiles; ++t) {
                const std::size_t at = (first + t) * T, here = std::min(T, width - at);
                float* const place = to + t * (DOT_SAMPLES + 1) * T + i * T;
                std::copy_n(from + (sample + i) * width + at, here, place);
                std::fill(place + here, place + T, 0.0f);
            }
    };
    const Cuts rows{s.row_tiles(), 1, threads};
    parallel(threads, threads, [&](std::size_t t) {
        const std::size_t first = rows(t), end = rows(t + 1);
        if (first == end) return;
        constexpr std::size_t step = (DOT_SAMPLES + 1) * T;
        float* const dys = scratch(0, (end - first) * step);
        float* const xs = scratch(1, group * step);
        for (std::size_t sample = 0; sample < n; sample += DOT_SAMPLES) {
            const std::size_t samples = std::min(DOT_SAMPLES, n - sample);
            panels(dy, s.rows, first, end - first, sample, samples, dys);
            for (std::size_t c = 0; c < s.col_tiles(); c += group) {
                const std::size_t tiles = std::min(group, s.col_tiles() - c);
                panels(x, s.cols, c, tiles, sample, samples, xs);
                for (std::size_t r = first; r < end; ++r) {
                    const std::size_t tile = r * s.col_tiles() + c;
                    k.dots({xs, step, dys + (r - first) * step, samples, tiles, s.steps, w.index + tile * index_tile,
                            out + tile * value_tile, sample != 0});
                }
            }
        }
    });
    for (std::size_t i = 0; i < s.tiles() * s.steps; ++i)
        if (w.used[i] != 0xffff)
            for (std::size_t r = 0; r < T; ++r)
                if ((w.used[i] >> r & 1) == 0) out[i * T + r] = 0.0f;
}

NMLinear::NMLinear(const NMShape& shape, std::vector<float> values, std::vector<std::int32_t> index, std::size_t tokens,
                   std::vector<float> bias, Act act)
    : Layer({shape.cols * tokens}, shape.rows * tokens), shape_(shape), values_(std::move(values)), index_(std::move(index)), tokens_(tokens),
      bias_(std::move(bias)), act_(act) {}

void NMLinear::run(const float* const* inputs, float* output, float*, std::size_t batch, std::size_t threads) const {
    n_m_forward({shape_, values_.data(), index_.data(), nullptr}, inputs[0], batch * tokens_, bias_.empty() ? nullptr : bias_.data(), act_,
                output, threads);
}

std::size_t NMLinear::bytes() const { return 4 * (values_.size() + index_.size() + bias_.size()); }

}  // namespace rarefy
