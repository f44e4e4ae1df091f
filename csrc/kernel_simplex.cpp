// One pass over the entries of a capped simplex, in vectors of eight doubles; compiled without contraction of a * b - c, so that
// every instruction set rounds alike.
#include <cstring>

#include "simplex.hpp"

namespace rarefy::RAREFY_LEVEL {
namespace {

constexpr std::size_t lanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
typedef long long Flags __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(32)));
typedef signed char Bytes __attribute__((vector_size(8)));

inline void load(const float* x, Doubles& out) {
    Floats some;
    std::memcpy(&some, x, sizeof some);
    out = __builtin_convertvector(some, Doubles);
}
inline void load(const double* x, Doubles& out) { std::memcpy(&out, x, sizeof out); }
inline void store(float* x, const Doubles& in) {
    const Floats some = __builtin_convertvector(in, Floats);
    std::memcpy(x, &some, sizeof some);
}
inline void store(double* x, const Doubles& in) { std::memcpy(x, &in, sizeof in); }

inline void clip(Doubles& t) {
    const Doubles none{}, one = none + 1.0;
    t = t > none ? t : none;
    t = t < one ? t : one;
}

inline double sum(const Doubles& x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

template <class T> struct Scan {
    double p, q;
    Doubles at_p{}, at_q{}, full{}, slope{}, offset{};
    Flags open{}, positive{}, bad{};

    void take(const T* a, const T* c, std::size_t c_step, std::uint8_t* out) {
        const Doubles none{}, one = none + 1.0;
        Doubles x, y;
        load(a, x);
        if (c_step != 0)
            load(c, y);
        else
            y = none + static_cast<double>(c[0]);
        Doubles t = p * x - y, s = q * x - y;
        const Flags over = t >= one, under = s <= none, between = (t > none) & (s < one), unsettled = ~(over | under | between);
        clip(t);
        clip(s);
        at_p += t;
        at_q += s;
        full += over ? one : none;
        slope += between ? x : none;
        offset += between ? y : none;
        open -= unsettled;  // a true flag is -1
        positive -= x > none;
        bad |= ~((x >= none) & (x <= none + 1.7e308) & (y >= none) & (y <= none + 1.7e308));
        const Bytes flags = __builtin_convertvector(unsettled, Bytes) & 1;
        std::memcpy(out, &flags, sizeof flags);
    }
};

template <class T>
SimplexTally scan(const T* a, const T* c, std::size_t c_step, std::size_t n, double p, double q, std::uint8_t* open) {
    Scan<T> all{p, q};
    std::size_t i = 0;
    for (; i + lanes <= n; i += lanes) all.take(a + i, c + i * c_step, c_step, open + i);
    if (i < n) {  // entries of a = c = 0 add nothing to any sum
        T x[lanes] = {}, y[lanes] = {};
        std::uint8_t flags[lanes];
        for (std::size_t j = 0; i + j < n; ++j) {
            x[j] = a[i + j];
            y[j] = c[(i + j) * c_step];
        }
        all.take(x, y, 1, flags);
        for (std::size_t j = 0; i + j < n; ++j) open[i + j] = flags[j];
    }
    SimplexTally tally{sum(all.at_p), sum(all.at_q), sum(all.full), sum(all.slope), sum(all.offset)};
    for (std::size_t j = 0; j < lanes; ++j) {
        tally.open += static_cast<std::size_t>(all.open[j]);
        tally.positive += static_cast<std::size_t>(all.positive[j]);
        tally.bad |= all.bad[j] != 0;
    }
    return tally;
}

template <class T> void fill(const T* a, const T* c, std::size_t c_step, std::size_t n, double mu, T* u) {
    std::size_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        Doubles x, y;
        load(a + i, x);
        if (c_step != 0)
            load(c + i, y);
        else
            y = Doubles{} + static_cast<double>(c[0]);
        Doubles t = mu * x - y;
        clip(t);
        store(u + i, t);
    }
    for (; i < n; ++i) {
        const double t = mu * static_cast<double>(a[i]) - static_cast<double>(c[i * c_step]);
        u[i] = static_cast<T>(t > 0.0 ? (t < 1.0 ? t : 1.0) : 0.0);
    }
}

}  // namespace

extern const SimplexKernels simplex{{scan<float>, fill<float>}, {scan<double>, fill<double>}};

}  // namespace rarefy::RAREFY_LEVEL
