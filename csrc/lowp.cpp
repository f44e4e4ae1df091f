#include "lowp.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "scratch.hpp"

namespace rarefy {
namespace {

// The weight in units of `per` inputs, each a word.
struct Units {
    std::vector<std::int64_t> crow;
    std::vector<std::int32_t> col;
    std::vector<float> words;
    std::size_t rows, cols;
    Csr csr() const { return {crow.data(), col.data(), words.data(), rows, cols}; }
};

template <class Word> Units units(const Csr& w, std::size_t per, const Word& place) {
    Units u{{0}, {}, {}, w.rows, (w.cols + per - 1) / per};
    u.crow.reserve(w.rows + 1);
    for (std::size_t m = 0; m < w.rows; ++m) {
        for (auto i = static_cast<std::size_t>(w.crow[m]); i < static_cast<std::size_t>(w.crow[m + 1]);) {
            const std::size_t unit = static_cast<std::size_t>(w.col[i]) / per;
            std::uint32_t word = 0;
            for (; i < static_cast<std::size_t>(w.crow[m + 1]) && static_cast<std::size_t>(w.col[i]) / per == unit; ++i)
                word |= place(w.values[i], static_cast<std::size_t>(w.col[i]) % per);
            u.col.push_back(static_cast<std::int32_t>(unit));
            float bits;
            std::memcpy(&bits, &word, sizeof bits);
            u.words.push_back(bits);
        }
        u.crow.push_back(static_cast<std::int64_t>(u.col.size()));
    }
    return u;
}

Spmm bfloat16_product(const Csr& w, std::size_t columns, std::size_t threads) {
    const Units u = units(w, 2, [](float value, std::size_t at) {
        std::uint16_t half;
        RAREFY_AT_LEVEL(lowp).to_bfloat16(&value, 1, &half);
        return static_cast<std::uint32_t>(half) << (16 * at);
    });
    return Spmm(u.csr(), columns, threads, Spmm::For::planes_and_linear, Words::bfloat16);
}

Spmm int8_product(const Csr& w, std::size_t columns, std::size_t threads) {
    const Units u = units(w, 4, [](float value, std::size_t at) {
        return static_cast<std::uint32_t>(static_cast<std::uint8_t>(static_cast<std::int8_t>(std::lrint(value)))) << (8 * at);
    });
    return Spmm(u.csr(), columns, threads, Spmm::For::planes_and_linear, Words::int8);
}

}  // namespace

bool has_dot_products() {
#ifdef RAREFY_X86
    static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    return has && isa() == "avx512";
#else
    return false;
#endif
}

const LowpKernels& lowp_kernels() {
#ifdef RAREFY_X86
    if (has_dot_products()) return avx512_dots::lowp;
#endif
    return RAREFY_AT_LEVEL(lowp);
}

const StripLoops& strip_loops(Words words) {
    if (words == Words::float32) return strip_kernels().loops;
    return words == Words::bfloat16 ? lowp_kernels().bfloat16 : lowp_kernels().int8;
}

Bfloat16Product::Bfloat16Product(const Csr& w, std::size_t columns, std::size_t threads)
    : cols_(w.cols), spmm_(bfloat16_product(w, columns, threads)) {}

void Bfloat16Product::linear(const float* x, std::size_t n, float* y, const float* bias, Act act, std::size_t threads) const {
    const std::size_t pairs = spmm_.cols();
    float* const words = scratch(2, n * pairs);
    auto* const halves = reinterpret_cast<std::uint16_t*>(words);
    for (std::size_t i = 0; i < n; ++i) {
        lowp_kernels().to_bfloat16(x + i * cols_, cols_, halves + i * 2 * pairs);
        if (cols_ % 2 != 0) halves[i * 2 * pairs + cols_] = 0;
    }
    spmm_.linear(words, pairs, n, y, rows(), bias, act, threads);
}

void Bfloat16Product::planes(const float* x, std::size_t batch, std::size_t pixels, float* y, const float* bias,
                             const float* residual, Act act, std::size_t threads) const {
    const LowpKernels& k = lowp_kernels();
    const Spmm::Pack pack = [&](std::size_t image, const Spmm::Task& t, std::size_t first, std::size_t size, float* strip,
                                std::size_t width) {
        k.pack_pairs(x + (image * cols_ + 2 * first) * pixels + t.column, pixels, size, cols_ - 2 * first, t.columns, strip, width);
        return Spmm::Place{reinterpret_cast<const char*>(strip), width * sizeof(float)};
    };
    spmm_.product(pack, {y, bias, residual, act, batch, pixels, rows() * pixels, false}, threads);
}

Int8Product::Int8Product(const Csr& w, const float* scale, std::size_t columns, std::size_t threads)
    : cols_(w.cols), scale_(scale, scale + w.rows), row_sum_(w.rows), spmm_(int8_product(w, columns, threads)) {
    for (std::size_t m = 0; m < w.rows; ++m)
        for (auto i = w.crow[m]; i < w.crow[m + 1]; ++i) row_sum_[m] += static_cast<std::int32_t>(std::lrint(w.values[i]));
}

void Int8Product::linear(const std::uint8_t* x, float x_scale, std::int32_t x_zero, std::size_t n, float* y, const float* bias,
                         Act act, std::size_t threads) const {
    const std::size_t quads = spmm_.cols();
    const float* words = reinterpret_cast<const float*>(x);
    if (cols_ % 4 != 0 || reinterpret_cast<std::uintptr_t>(x) % alignof(float) != 0) {
        float* const padded = scratch(2, n * quads);
        auto* const bytes = reinterpret_cast<std::uint8_t*>(padded);
        for (std::size_t i = 0; i < n; ++i) {
            std::memcpy(bytes + i * 4 * quads, x + i * cols_, cols_);
            std::memset(bytes + i * 4 * quads + cols_, 0, 4 * quads - cols_);
        }
        words = padded;
    }
    std::vector<float> scale(scale_.size());
    std::vector<std::int32_t> shift(scale_.size());
    for (std::size_t m = 0; m < scale.size(); ++m) {
        scale[m] = scale_[m] * x_scale;
        shift[m] = row_sum_[m] * x_zero;
    }
    const Spmm::Finish finish = [&](float* sums, std::size_t row, std::size_t rows, std::size_t width) {
        lowp_kernels().dequantise(sums, rows, width, scale.data() + row, shift.data() + row);
    };
    spmm_.linear(words, quads, n, y, rows(), bias, act, threads, finish);
}

}  // namespace rarefy
