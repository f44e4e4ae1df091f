// Selection kernels in plain loops that the compiler turns into vector code; see select.cpp for how they are put together.
#include <cstring>

#include "kernels.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t block = 256;

template <class T> constexpr Key<T> infinity_bits;
template <> constexpr std::int32_t infinity_bits<float> = 0x7f800000;
template <> constexpr std::int64_t infinity_bits<double> = 0x7ff0000000000000;

template <class T> inline Key<T> bits_of(const T* x) {
    Key<T> bits;
    std::memcpy(&bits, x, sizeof bits);
    return bits;
}

template <class T> inline Key<T> magnitude(Key<T> bits) { return bits & ~(Key<T>{1} << (8 * sizeof(T) - 1)); }

// Integer work all the way: a thread that flushes denormal floats to zero still orders them.
template <class T> inline Key<T> key_of(Key<T> bits) {
    const Key<T> sign = bits >> (8 * sizeof(T) - 1);
    return (magnitude<T>(bits) ^ sign) - sign;
}

template <class T> inline Key<T> key_at(const T* x) { return key_of<T>(bits_of(x)); }

template <class T> bool keys(const T* x, std::size_t n, Key<T>* out) {
    Key<T> nan = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const Key<T> bits = bits_of(x + i);
        nan |= magnitude<T>(bits) > infinity_bits<T> ? Key<T>{1} : Key<T>{0};
        out[i] = key_of<T>(bits);
    }
    return nan != 0;
}

template <class T> std::size_t count_keys(const Key<T>* keys, std::size_t n, Key<T> t) {
    std::size_t total = 0;
    while (n > 0) {
        const std::size_t piece = n < (std::size_t{1} << 30) ? n : std::size_t{1} << 30;
        Key<T> count = 0;
        for (std::size_t i = 0; i < piece; ++i) count += keys[i] >= t ? Key<T>{1} : Key<T>{0};
        total += static_cast<std::size_t>(count);
        keys += piece;
        n -= piece;
    }
    return total;
}

template <class T> std::size_t count(const T* x, std::size_t n, Key<T> t) {
    std::size_t total = 0;
    while (n > 0) {
        const std::size_t piece = n < (std::size_t{1} << 30) ? n : std::size_t{1} << 30;
        Key<T> some = 0;
        for (std::size_t i = 0; i < piece; ++i) some += key_at(x + i) >= t ? Key<T>{1} : Key<T>{0};
        total += static_cast<std::size_t>(some);
        x += piece;
        n -= piece;
    }
    return total;
}

// One block of `window`: flags for key >= hi and lo < key < hi, and the counts of key >= hi, key == hi and key == lo.
template <class T> struct BlockCounts { Key<T> from_hi = 0, at_hi = 0, at_lo = 0, nan = 0; };

template <class T>
inline BlockCounts<T> flag_block(const T* __restrict x, Key<T> lo, Key<T> hi, std::uint8_t* __restrict from_hi,
                                 std::uint8_t* __restrict inside) {
    Key<T> nan = 0, count = 0, at_hi = 0, at_lo = 0;
    for (std::size_t i = 0; i < block; ++i) {
        const Key<T> bits = bits_of(x + i), key = key_of<T>(bits);
        const Key<T> from = key >= hi ? Key<T>{1} : Key<T>{0}, over = key > lo ? Key<T>{1} : Key<T>{0};
        nan |= magnitude<T>(bits) > infinity_bits<T> ? Key<T>{1} : Key<T>{0};
        count += from;
        at_hi += key == hi ? Key<T>{1} : Key<T>{0};
        at_lo += key == lo ? Key<T>{1} : Key<T>{0};
        from_hi[i] = static_cast<std::uint8_t>(from);
        inside[i] = static_cast<std::uint8_t>(over & ~from);  // no && here: a branch would keep the loop from vector code
    }
    return {count, at_hi, at_lo, nan};
}

template <class T>
WindowCounts window(const T* x, std::size_t n, Key<T> lo, Key<T> hi, std::uint8_t* mask, Key<T>* out_keys,
                    std::uint32_t* out_at, std::size_t room) {
    WindowCounts total;
    const auto collect = [&](std::uint64_t flags, std::size_t at) {
        for (; flags != 0; flags &= flags - 1) {
            const std::size_t i = at + static_cast<std::size_t>(__builtin_ctzll(flags)) / 8;
            if (total.inside < room) {
                out_keys[total.inside] = key_at(x + i);
                out_at[total.inside] = static_cast<std::uint32_t>(i);
            }
            ++total.inside;
        }
    };
    std::uint8_t inside[block];
    std::size_t at = 0;
    for (; at + block <= n; at += block) {
        const BlockCounts<T> c = flag_block<T>(x + at, lo, hi, mask + at, inside);
        total.nan |= c.nan != 0;
        total.above += static_cast<std::size_t>(c.from_hi - c.at_hi);
        total.at_hi += static_cast<std::size_t>(c.at_hi);
        total.at_lo += static_cast<std::size_t>(c.at_lo);
        for (std::size_t i = 0; i < block; i += 8) {
            std::uint64_t flags;
            std::memcpy(&flags, inside + i, 8);
            if (flags != 0) collect(flags, at + i);
        }
    }
    for (; at < n; ++at) {
        const Key<T> bits = bits_of(x + at), key = key_of<T>(bits);
        total.nan |= magnitude<T>(bits) > infinity_bits<T>;
        total.above += key > hi;
        total.at_hi += key == hi;
        total.at_lo += key == lo;
        mask[at] = key >= hi ? 1 : 0;
        if (key > lo && key < hi) collect(1, at);
    }
    return total;
}

// mask[0..n) = key >= t
template <class T> inline void threshold(const T* x, std::size_t n, Key<T> t, std::uint8_t* mask) {
    for (std::size_t i = 0; i < n; ++i) mask[i] = key_at(x + i) >= t ? 1 : 0;
}

template <class T> void finish(const T* x, std::size_t n, Key<T> t, std::size_t ties, std::uint8_t* mask) {
    if (ties == 0) return threshold(x, n, static_cast<Key<T>>(t + 1), mask);
    for (std::size_t at = 0; at < n; at += block) {
        const std::size_t here = n - at < block ? n - at : block;
        Key<T> equal = 0;
        for (std::size_t i = 0; i < here; ++i) equal += key_at(x + at + i) == t ? Key<T>{1} : Key<T>{0};
        if (static_cast<std::size_t>(equal) <= ties) {
            threshold(x + at, here, t, mask + at);
            ties -= static_cast<std::size_t>(equal);
            if (ties == 0) return threshold(x + at + here, n - at - here, static_cast<Key<T>>(t + 1), mask + at + here);
            continue;
        }
        for (std::size_t i = at; i < at + here; ++i) {
            const Key<T> key = key_at(x + i);
            const bool tie = key == t && ties > 0;
            ties -= tie;
            mask[i] = (key > t || tie) ? 1 : 0;
        }
        return threshold(x + at + here, n - at - here, static_cast<Key<T>>(t + 1), mask + at + here);
    }
}

// Short rows: the rank of an entry is how many of its row beat it, being larger, or equal and earlier. Many rows are laid end to
// end, and each is compared with itself shifted by 1, 2, ...: whole vectors at a time, whatever the width.
template <class T>
bool short_rows(const T* x, std::size_t rows, std::size_t width, const std::int64_t* k, std::size_t k_step,
                std::uint8_t* mask) {
    constexpr std::size_t room = 512, longest = 16;
    using K = Key<T>;
    K padded[room + 2 * longest] = {}, rank[room], place[room], quota[room], nan = 0;
    K* const key = padded + longest;  // the padding lets a shift run over the ends; `place` discounts what it brings in
    const std::size_t step = room / width;
    const K w = static_cast<K>(width);
    for (std::size_t i = 0; i < step * width; ++i) {
        place[i] = static_cast<K>(i % width);
        quota[i] = static_cast<K>(k[0]);
    }
    for (std::size_t at = 0; at < rows; at += step) {
        const std::size_t n = (rows - at < step ? rows - at : step) * width;
        const T* in = x + at * width;
        for (std::size_t i = 0; i < n; ++i) {
            const K bits = bits_of(in + i);
            nan |= magnitude<T>(bits) > infinity_bits<T> ? K{1} : K{0};
            key[i] = key_of<T>(bits);
            rank[i] = 0;
        }
        for (std::size_t shift = 1; shift < width; ++shift) {
            const K s = static_cast<K>(shift);
            const K *later = key + shift, *earlier = key - shift;
            for (std::size_t i = 0; i < n; ++i) {
                const K by_later = (later[i] > key[i] ? K{1} : K{0}) & (place[i] < w - s ? K{1} : K{0});
                const K by_earlier = (earlier[i] >= key[i] ? K{1} : K{0}) & (place[i] >= s ? K{1} : K{0});
                rank[i] += by_later + by_earlier;
            }
        }
        if (k_step != 0)
            for (std::size_t r = 0; r < n / width; ++r)
                for (std::size_t i = 0; i < width; ++i) quota[r * width + i] = static_cast<K>(k[(at + r) * k_step]);
        std::uint8_t* out = mask + at * width;
        for (std::size_t i = 0; i < n; ++i) out[i] = rank[i] < quota[i] ? 1 : 0;
    }
    return nan != 0;
}

template <class T> SelectKernels<T> table() {
    return {keys<T>, count_keys<T>, count<T>, window<T>, finish<T>, short_rows<T>};
}

}  // namespace

SelectKernels<float> select32() { return table<float>(); }
SelectKernels<double> select64() { return table<double>(); }

}  // namespace rarefy::RAREFY_LEVEL
