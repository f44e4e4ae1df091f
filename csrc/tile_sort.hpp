// A sorting network over vectors, every lane by itself: Batcher's odd-even merge sort, unrolled.
#pragma once

namespace rarefy::RAREFY_LEVEL {

template <int I, int J, class V> inline __attribute__((always_inline)) void order(V* s) {
    const V a = s[I], b = s[J];
    const auto falls = a > b;
    s[I] = falls ? a : b;
    s[J] = falls ? b : a;
}

template <int I, int END, int STEP, int GAP, class V> inline __attribute__((always_inline)) void order_pairs(V* s) {
    if constexpr (I + GAP < END) {
        order<I, I + GAP>(s);
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
        order<FROM, FROM + GAP>(s);
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

}  // namespace rarefy::RAREFY_LEVEL
