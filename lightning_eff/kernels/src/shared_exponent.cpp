// Integers in units of one scale per tensor (Flexpoint, DFP-16), for the CPU: one pass that also measures max|x|.
//
// Every decision is that of lightning_eff/functional/numerics/flexpoint.py (same hash of the element's position, same
// comparisons): a test holds both equal bit for bit. Blocks of BLOCK elements, so results do not depend on the number
// of threads. Compile with -ffp-contract=off.
//
// Element types: 0 = float32, 1 = bfloat16.

#include "common.h"

namespace {

constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23: y + NEAREST rounds |y| <= 2^15 to an integer, ties to even

// What is added to the bits of a multiple of the scale before its lower half is cut off. Rounding a bfloat16 number to
// such a multiple leaves it at most its 8 bits, so that nothing is lost. Only 2^(N-1) - 1, where values saturate, may
// lie halfway to 2^(N-1) or closer: it goes there, which is the even one.
inline int32_t to_nearest(const float*) { return 0; }
inline int32_t to_nearest(const uint16_t*) { return 0x8000; }

struct Range { float inverse, low, high; };  // of the codes; the reciprocal of a power of two is exact

inline float in_units(float x, const Range& r) {  // NaN passes both comparisons
    return std::min(std::max(x * r.inverse, r.low), r.high);
}

// The low half of the sum's bits is the integer in two's complement; no conversion, so NaN is no undefined behaviour.
inline int16_t integer(float y) { return static_cast<int16_t>(as_int(y + NEAREST)); }

inline float stochastic(float y, int64_t j, uint32_t seed) {
    const int32_t u = random_23(j, seed);
    const float a = std::fabs(y), lower = std::floor(a);
    return std::copysign(lower + (static_cast<float>(u) < (a - lower) * 8388608.0f ? 1.0f : 0.0f), y);
}

// Codes of a block; returns the bits of its largest magnitude.
template <bool STOCHASTIC, class In>
int32_t encode_block(const In* x, int16_t* codes, int64_t count, const Range r, uint32_t seed) {
    int32_t top = 0;
    #pragma omp simd reduction(max:top)
    for (int64_t j = 0; j < count; ++j) {
        const float v = read(x, j);
        top = std::max(top, as_int(v) & MAGNITUDE);
        const float y = in_units(v, r);
        codes[j] = integer(STOCHASTIC ? stochastic(y, j, seed) : y);
    }
    return top;
}

template <bool STOCHASTIC, class In>
int32_t encode(const In* x, int64_t n, const Range& r, uint64_t seed, int16_t* codes, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int32_t top = 0;
    #pragma omp parallel for num_threads(threads) reduction(max:top) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        const uint32_t row = STOCHASTIC ? row_seed(seed, b) : 0;
        top = std::max(top, encode_block<STOCHASTIC>(x + begin, codes + begin, count, r, row));
    }
    return top;
}

template <class In>
int32_t encode(const In* x, int64_t n, const Range& r, bool stochastic, uint64_t seed, int16_t* codes, int threads) {
    return stochastic ? encode<true>(x, n, r, seed, codes, threads) : encode<false>(x, n, r, seed, codes, threads);
}

template <class T>
int32_t round_block(T* x, int64_t count, const Range r, float scale) {
    int32_t top = 0;
    #pragma omp simd reduction(max:top)
    for (int64_t j = 0; j < count; ++j) {
        const float v = read(x, j);
        const int32_t magnitude = as_int(v) & MAGNITUDE;
        top = std::max(top, magnitude);
        const int32_t q = as_int(((in_units(v, r) + NEAREST) - NEAREST) * scale);
        write(x, j, magnitude < INFINITE ? q + to_nearest(x) : as_int(v));
    }
    return top;
}

template <class T>
int32_t round_all(T* x, int64_t n, const Range& r, float scale, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int32_t top = 0;
    #pragma omp parallel for num_threads(threads) reduction(max:top) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b)
        top = std::max(top, round_block(x + b * BLOCK, std::min(BLOCK, n - b * BLOCK), r, scale));
    return top;
}

Range range_of(float scale, int bits, bool symmetric) {
    const float half = static_cast<float>(1 << (bits - 1));
    return {1.0f / scale, symmetric ? 1.0f - half : -half, half - 1.0f};
}

}  // namespace

extern "C" {

// Codes clamp(round(x / *scale)) and, in *kept, the scale that multiplies them back; zeros and NaN if an element or the
// scale is not finite. `observed` (may be null) receives max|x|, NaN if an element is NaN.
void eff_integer_encode(const void* x, int type, int64_t n, const float* scale, int bits, int symmetric, int stochastic,
                        uint64_t seed, int16_t* codes, float* kept, float* observed, int threads) {
    const Range r = range_of(*scale, bits, symmetric != 0);
    const int32_t top =
        type == 0 ? encode(static_cast<const float*>(x), n, r, stochastic != 0, seed, codes, threads)
                  : encode(static_cast<const uint16_t*>(x), n, r, stochastic != 0, seed, codes, threads);
    const bool sound = top < INFINITE && std::isfinite(*scale);
    if (!sound) std::memset(codes, 0, 2 * n);
    *kept = sound ? *scale : as_float(NOT_A_NUMBER);
    if (observed) *observed = as_float(top);
}

// x <- clamp(round(x / *scale)) * *scale in place, element by element; elements that are not finite stay as they are.
void eff_round_to_scale(void* x, int type, int64_t n, const float* scale, int bits, float* observed, int threads) {
    const float unit = std::isnan(*scale) ? as_float(NOT_A_NUMBER) : *scale;  // to_nearest would carry a full payload
    const Range r = range_of(unit, bits, false);
    const int32_t top = type == 0 ? round_all(static_cast<float*>(x), n, r, unit, threads)
                                  : round_all(static_cast<uint16_t*>(x), n, r, unit, threads);
    if (observed) *observed = as_float(top);
}

}  // extern "C"
