// Products of int16 matrices for the CPU: int32 chains that cannot overflow, their sums added up in float32.
//
// Das et al., Mixed Precision Training of Convolutional Neural Networks using Integer Operations, ICLR 2018: chains of
// integer multiply-adds are kept short enough for INT32 and then added to a float32 accumulator. How short is decided
// here from the data. With u the Euclidean norm of BLOCK consecutive terms of a row and v that of a column, the terms
// add up to at most u v in magnitude (Cauchy-Schwarz), and so does every part of them. A chain goes on while the sum of
// these bounds, from the largest norms among the MR rows and NR columns of a tile, fits INT32; a block that does not
// fit on its own is taken as two pairs. The norms are exact integers, rounded up. Chains depend on the tile, whose place
// is fixed, and on K: neither threads nor cache blocking change a bit, nor does the processor.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 finds them in its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

namespace {

constexpr int MR = 6, NR = 32;                  // a tile: 12 registers of int32 sums, 12 of float32 totals, 3 of operands
constexpr int KC = 512, MC = 192, STRIP = 256;  // KC x MR of a stays in the first cache, KC x (MC + STRIP) in the second
constexpr int NC = 2048;                        // columns packed at a time
constexpr int BLOCK = 4, SQUARE = 16;           // terms per norm; words (pairs of terms) per side of what is packed at once
constexpr uint64_t LIMIT = 0x7FFFFFFF;
constexpr int64_t PARALLEL = 1 << 20;

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Element (outer, k) of a row of the left or a column of the right matrix lies at outer * step + k * term.
struct Operand {
    const int16_t* x;
    int64_t count, terms, step, term;
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
template <int... I, class F>
inline void each_of(std::integer_sequence<int, I...>, F f) { (f(std::integral_constant<int, I>{}), ...); }

// f(0) ... f(N - 1), written out: arrays indexed by constants stay in registers.
template <int N, class F>
inline void each(F f) { each_of(std::make_integer_sequence<int, N>{}, f); }

// 16 x 16 words, rows for columns.
inline void transpose(__m512i* r) {
    __m512i t[SQUARE];
    each<8>([&](auto i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    });
    each<8>([&](auto i) {
        constexpr int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
        r[to] = _mm512_unpacklo_epi64(t[from], t[from + 2]);
        r[to + 1] = _mm512_unpackhi_epi64(t[from], t[from + 2]);
    });
    each<8>([&](auto i) {
        constexpr int at = i / 4 * 8 + i % 4;
        t[at] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0x88);
        t[at + 4] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0xDD);
    });
    each<8>([&](auto i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    });
}

// The first `left` lanes of `most`, none if negative.
inline uint32_t lanes(int64_t left, int most) {
    return left >= most ? 0xFFFFFFFFu >> (32 - most) : (1u << std::max<int64_t>(left, 0)) - 1;
}

template <bool WHOLE>
inline void load_square(const Operand& m, int64_t outer, int64_t k, __m512i* w) {
    const int16_t* x = m.x + outer * m.step + k * m.term;
    const int64_t rows = m.count - outer, terms = m.terms - k;
    if (m.term == 1) {
        const __mmask32 some = lanes(terms, 32);
        each<SQUARE>([&](auto i) { w[i] = _mm512_maskz_loadu_epi16(WHOLE ? ~0u : i < rows ? some : 0u, x + i * m.step); });
        return;
    }
    const __mmask16 some = static_cast<__mmask16>(lanes(rows, 16)), none = 0;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(0x10001)), _mm512_set1_epi32(0x200000));
    each<SQUARE>([&](auto i) {
        const __m256i low = _mm256_maskz_loadu_epi16(WHOLE ? 0xFFFF : 2 * i < terms ? some : none, x + 2 * i * m.term);
        const __m256i high = _mm256_maskz_loadu_epi16(WHOLE ? 0xFFFF : 2 * i + 1 < terms ? some : none, x + (2 * i + 1) * m.term);
        // Elements 0, 32, 1, 33 ...: a pair of terms from each of 16 rows or columns.
        w[i] = _mm512_permutex2var_epi16(_mm512_castsi256_si512(low), order, _mm512_castsi256_si512(high));
    });
}

// 16 rows or columns by 32 terms, zeros beyond the end, as words of two terms; word (outer, pair) goes to
// to[outer * stride + pair] or, for `columns`, to[pair * stride + outer].
void pack_square(const Operand& m, int64_t outer, int64_t k, bool columns, int32_t* to, int64_t stride) {
    __m512i w[SQUARE];
    if (outer + SQUARE <= m.count && k + 2 * SQUARE <= m.terms) load_square<true>(m, outer, k, w);
    else load_square<false>(m, outer, k, w);
    if ((m.term == 1) == columns) transpose(w);
    each<SQUARE>([&](auto i) { _mm512_storeu_si512(to + i * stride, w[i]); });
}

struct Tile {
    __m512i sum[2 * MR];
    __m512 total[2 * MR];

    inline void clear() { each<2 * MR>([&](auto i) { sum[i] = _mm512_setzero_si512(); total[i] = _mm512_setzero_ps(); }); }
    inline void add(const int32_t* a, const int32_t* b) {
        const __m512i left = _mm512_load_si512(b), right = _mm512_load_si512(b + 16);
        each<MR>([&](auto i) {
            const __m512i x = _mm512_set1_epi32(a[i * (KC / 2)]);
            sum[2 * i] = _mm512_dpwssd_epi32(sum[2 * i], x, left);
            sum[2 * i + 1] = _mm512_dpwssd_epi32(sum[2 * i + 1], x, right);
        });
    }
    // The negative is taken because one pair, (-32768, -32768) with itself, makes 2^31, which wraps to -2^31: its own negative.
    inline void flush() {
        each<2 * MR>([&](auto i) {
            const __m512i negative = _mm512_sub_epi32(_mm512_setzero_si512(), sum[i]);
            total[i] = _mm512_sub_ps(total[i], _mm512_cvtepi32_ps(negative));
            sum[i] = _mm512_setzero_si512();
        });
    }
    inline void store(float* c, int64_t stride, bool first) const {
        each<2 * MR>([&](auto i) {
            float* to = c + i / 2 * stride + i % 2 * 16;
            _mm512_storeu_ps(to, first ? total[i] : _mm512_add_ps(_mm512_loadu_ps(to), total[i]));
        });
    }
};

#else

void pack_square(const Operand& m, int64_t outer, int64_t k, bool columns, int32_t* to, int64_t stride) {
    const auto term = [&](int64_t i, int64_t j) {
        return i < m.count && j < m.terms ? static_cast<uint16_t>(m.x[i * m.step + j * m.term]) : uint32_t{0};
    };
    for (int64_t i = 0; i < SQUARE; ++i) for (int64_t p = 0; p < SQUARE; ++p)
        to[columns ? p * stride + i : i * stride + p] =
            static_cast<int32_t>(term(outer + i, k + 2 * p) | term(outer + i, k + 2 * p + 1) << 16);
}

struct Tile {
    uint32_t sum[MR][NR];  // unsigned: wrapping is defined
    float total[MR][NR];

    void clear() {
        std::fill(sum[0], sum[0] + MR * NR, 0u);
        std::fill(total[0], total[0] + MR * NR, 0.0f);
    }
    void add(const int32_t* a, const int32_t* b) {
        for (int i = 0; i < MR; ++i) {
            const int32_t x = a[i * (KC / 2)], low = static_cast<int16_t>(x), high = x >> 16;
            #pragma omp simd
            for (int j = 0; j < NR; ++j)
                sum[i][j] += static_cast<uint32_t>(low * static_cast<int16_t>(b[j])) + static_cast<uint32_t>(high * (b[j] >> 16));
        }
    }
    void flush() {
        for (int i = 0; i < MR; ++i) for (int j = 0; j < NR; ++j) {
            total[i][j] -= static_cast<float>(static_cast<int32_t>(0u - sum[i][j]));
            sum[i][j] = 0;
        }
    }
    void store(float* c, int64_t stride, bool first) const {
        for (int i = 0; i < MR; ++i) for (int j = 0; j < NR; ++j)
            c[i * stride + j] = first ? total[i][j] : c[i * stride + j] + total[i][j];
    }
};

#endif

inline uint32_t square_sum(int32_t word) {
    const int32_t low = static_cast<int16_t>(word), high = word >> 16;
    return static_cast<uint32_t>(low * low) + static_cast<uint32_t>(high * high);
}

// The squares of two words. Only 2^32 does not fit; it becomes 2^32 - 1, whose root rounds up to the same integer.
inline uint32_t block_sum(int32_t first, int32_t second) {
    const uint32_t one = square_sum(first), both = one + square_sum(second);
    return both - (both < one);
}

inline void take_roots(uint32_t* squares, int64_t blocks) {
    for (int64_t i = 0; i < blocks; ++i)
        squares[i] = static_cast<uint32_t>(static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(squares[i])))));
}

void row_norms(const int32_t* a, int64_t blocks, uint32_t* norms) {
    std::fill(norms, norms + blocks, 0u);
    for (int r = 0; r < MR; ++r, a += KC / 2)
        for (int64_t i = 0; i < blocks; ++i) norms[i] = std::max(norms[i], block_sum(a[2 * i], a[2 * i + 1]));
    take_roots(norms, blocks);
}

void column_norms(const int32_t* b, int64_t blocks, uint32_t* norms) {
    for (int64_t i = 0; i < blocks; ++i, b += 2 * NR) {
        uint32_t largest = 0;
        #pragma omp simd reduction(max : largest)
        for (int j = 0; j < NR; ++j) largest = std::max(largest, block_sum(b[j], b[j + NR]));
        norms[i] = largest;
    }
    take_roots(norms, blocks);
}

// c (MR, NR) = or += a tile of the product over `blocks` blocks of terms; u and v are the norms. Not inlined: GCC 12 then
// keeps every sum in its register.
__attribute__((noinline)) void multiply(const int32_t* a, const int32_t* b, const uint32_t* u, const uint32_t* v, int64_t blocks,
                                        float* c, int64_t stride, bool first) {
    Tile tile;
    tile.clear();
    uint64_t bound = 0;
    for (int64_t i = 0; i < blocks; ++i, a += 2, b += 2 * NR) {
        const uint64_t next = static_cast<uint64_t>(u[i]) * v[i];
        bound += next;
        if (bound > LIMIT) {
            tile.flush();
            bound = next;
            if (next > LIMIT) {
                tile.add(a, b);
                tile.flush();
                tile.add(a + 1, b + NR);
                bound = LIMIT;  // whatever follows starts a chain
                continue;
            }
        }
        tile.add(a, b);
        tile.add(a + 1, b + NR);
    }
    tile.flush();
    tile.store(c, stride, first);
}

struct alignas(64) Right { int32_t words[NC / NR][KC / 2][NR]; uint32_t norms[NC / NR][KC / BLOCK]; };
struct alignas(64) Left { int32_t words[MC][KC / 2]; uint32_t norms[MC / MR][KC / BLOCK]; };

// Packs along the contiguous dimension of the source.
void pack(const Operand& m, int64_t begin, int64_t count, int64_t k, int64_t terms, bool columns, int32_t* to, int64_t stride) {
    const int64_t wide = (count + SQUARE - 1) / SQUARE, deep = (terms + 2 * SQUARE - 1) / (2 * SQUARE);
    for (int64_t i = 0; i < wide * deep; ++i) {
        const int64_t outer = SQUARE * (m.term == 1 ? i / deep : i % wide), pair = SQUARE * (m.term == 1 ? i % deep : i / wide);
        int32_t* at = to + (columns ? pair * stride + outer : outer * stride + pair);
        pack_square(m, begin + outer, k + 2 * pair, columns, at, stride);
    }
}

void pack_right(const Operand& m, int64_t panel, int64_t begin, int64_t k, int64_t terms, Right& to) {
    pack(m, begin, NR, k, terms, true, to.words[panel][0], NR);
    column_norms(to.words[panel][0], terms / BLOCK, to.norms[panel]);
}

void pack_left(const Operand& m, int64_t begin, int64_t rows, int64_t k, int64_t terms, Left& to) {
    pack(m, begin, round_up(rows, MR), k, terms, false, to.words[0], KC / 2);
    for (int64_t i = 0; i < rows; i += MR) row_norms(to.words[i], terms / BLOCK, to.norms[i / MR]);
}

// Rows of c from one packed block of a and all packed columns; tiles that stick out go through a buffer.
void multiply_rows(const Left& left, const Right& right, int64_t rows, int64_t columns, int64_t terms, float* c, int64_t stride,
                   bool first) {
    for (int64_t strip = 0; strip < columns; strip += STRIP) for (int64_t i = 0; i < rows; i += MR)
        for (int64_t j = strip; j < std::min(columns, strip + STRIP); j += NR) {
            const int64_t height = std::min<int64_t>(MR, rows - i), width = std::min<int64_t>(NR, columns - j);
            const auto run = [&](float* to, int64_t step, bool fresh) {
                multiply(left.words[i], right.words[j / NR][0], left.norms[i / MR], right.norms[j / NR], terms / BLOCK, to, step,
                         fresh);
            };
            float* target = c + i * stride + j;
            if (height == MR && width == NR) { run(target, stride, first); continue; }
            float edge[MR][NR];
            run(edge[0], NR, true);
            for (int64_t r = 0; r < height; ++r) for (int64_t l = 0; l < width; ++l)
                target[r * stride + l] = first ? edge[r][l] : target[r * stride + l] + edge[r][l];
        }
}

}  // namespace

extern "C" {

// Whether the products run on the processor's int16 units rather than on plain loops.
void eff_int16_native(int32_t* native) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    *native = 1;
#else
    *native = 0;
#endif
}

// c (m, n), rows of n floats, = a (m, k) b (k, n); m, n, k >= 1; strides in elements, one of a's and one of b's is 1.
void eff_int16_product(const int16_t* a, int64_t a_row, int64_t a_column, const int16_t* b, int64_t b_row, int64_t b_column,
                       int64_t m, int64_t n, int64_t k, float* c, int threads) {
    static thread_local std::unique_ptr<Right> kept;  // per calling thread: page faults cost more than packing
    if (!kept) kept.reset(new Right);
    Right& right = *kept;
    const Operand rows{a, m, k, a_row, a_column}, columns{b, n, k, b_column, b_row};
    const bool parallel = threads > 1 && m * n * k >= PARALLEL;
    const int64_t parts = round_up((m + MC - 1) / MC, parallel ? threads : 1), height = round_up((m + parts - 1) / parts, MR);
    const int64_t slices = (k + KC - 1) / KC, depth = round_up((k + slices - 1) / slices, 2 * SQUARE);
    #pragma omp parallel num_threads(threads) if (parallel)
    {
        Left left;
        for (int64_t j = 0; j < n; j += NC) for (int64_t p = 0; p < k; p += depth) {
            const int64_t width = std::min<int64_t>(NC, n - j), terms = round_up(std::min(depth, k - p), BLOCK);
            #pragma omp for
            for (int64_t panel = 0; panel < (width + NR - 1) / NR; ++panel)
                pack_right(columns, panel, j + panel * NR, p, terms, right);
            #pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < m; i += height) {
                const int64_t block = std::min(height, m - i);
                pack_left(rows, i, block, p, terms, left);
                multiply_rows(left, right, block, width, terms, c + i * n + j, n, p == 0);
            }
        }
    }
}

}  // extern "C"
