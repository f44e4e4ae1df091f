// Sorting networks over vectors, every lane by itself: Batcher's odd-even merge sort, unrolled.
#pragma once

namespace rarefy::RAREFY_LEVEL {

// The larger first.
template <class V> inline __attribute__((always_inline)) void order(V& x, V& y) {
    const V a = x, b = y;
    const auto falls = a > b;
    x = falls ? a : b;
    y = falls ? b : a;
}

template <int I, int END, int STEP, int GAP, class V> inline __attribute__((always_inline)) void order_pairs(V* s) {
    if constexpr (I + GAP < END) {
        order(s[I], s[I + GAP]);
        order_pairs<I + STEP, END, STEP, GAP>(s);
    }
}

template <int FROM, int N, int GAP, class V> inline __attribute__((always_inline)) void merge(V* s) {
    constexpr int step = GAP * 2;
    if constexpr (step < N) {
        merge<FROM, N, step>(s);
        merge<FROM + GAP, N, step>(s);
        order_pairs<FROM + GAP, FROM + N, step, GAP>(s);
    } else {
        order(s[FROM], s[FROM + GAP]);
    }
}

// The largest first.
template <int N, int FROM = 0, class V> inline __attribute__((always_inline)) void sort_falling(V* s) {
    if constexpr (N > 1) {
        sort_falling<N / 2, FROM>(s);
        sort_falling<N / 2, FROM + N / 2>(s);
        merge<FROM, N, 1>(s);
    }
}

// The n-th and the (n + 1)-th largest of N. Halves that are sorted tell the larger half of all without being merged.
template <int N, class V> inline __attribute__((always_inline)) void ranks(V* s, int n, V& last, V& next) {
    if (n == N / 2) {
        sort_falling<N / 2>(s);
        sort_falling<N / 2, N / 2>(s);
        const auto falls = s[0] > s[N - 1];
        last = falls ? s[0] : s[N - 1];
        next = falls ? s[N - 1] : s[0];
#pragma GCC unroll 16
        for (int i = 1; i < N / 2; ++i) {
            order(s[i], s[N - 1 - i]);
            last = s[i] < last ? s[i] : last;
            next = s[N - 1 - i] > next ? s[N - 1 - i] : next;
        }
    } else {
        sort_falling<N>(s);
        last = s[n - 1];
        next = s[n];
    }
}

}  // namespace rarefy::RAREFY_LEVEL
