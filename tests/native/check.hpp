// A few lines of test frame for the native core: random shapes, buffers that end where they should, naive truths.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

namespace check {

struct Test {
    const char* name;
    void (*run)();
};
inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
struct Registered {
    Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }
};
#define TEST(name)                                          \
    static void name();                                     \
    static const check::Registered registered_##name(#name, name); \
    static void name()

#define CHECK(fits)                                                                 \
    do {                                                                            \
        if (!(fits)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #fits); \
            std::abort();                                                           \
        }                                                                           \
    } while (false)

inline std::mt19937& rng() {
    static std::mt19937 engine(1);
    return engine;
}
inline std::size_t pick(std::size_t low, std::size_t high) { return std::uniform_int_distribution<std::size_t>(low, high)(rng()); }
inline std::size_t pick(std::initializer_list<std::size_t> from) { return from.begin()[pick(0, from.size() - 1)]; }
inline float normal() { return std::normal_distribution<float>()(rng()); }

// Exactly n items on the heap: AddressSanitizer sees the first byte beyond. An odd start leaves nothing aligned by chance.
template <class T> class Exact {
public:
    explicit Exact(std::size_t n, T value = T{}) : data_(new T[n + 1]), n_(n) {
        for (std::size_t i = 0; i < n; ++i) data()[i] = value;
    }
    Exact(std::initializer_list<T> from) : Exact(from.size()) {
        for (std::size_t i = 0; i < n_; ++i) data()[i] = from.begin()[i];
    }
    T* data() { return data_.get() + 1; }
    const T* data() const { return data_.get() + 1; }
    std::size_t size() const { return n_; }
    T& operator[](std::size_t i) { return data()[i]; }
    const T& operator[](std::size_t i) const { return data()[i]; }

private:
    std::unique_ptr<T[]> data_;
    std::size_t n_;
};
using Floats = Exact<float>;

inline Floats randoms(std::size_t n) {
    Floats x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = normal();
    return x;
}

inline void near(const Floats& got, const std::vector<double>& expected, double tolerance = 2e-5) {
    CHECK(got.size() == expected.size());
    double scale = 1;
    for (const double e : expected) scale = std::max(scale, std::fabs(e));
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(static_cast<double>(got[i]) - expected[i]) <= tolerance * scale);
}

}  // namespace check
