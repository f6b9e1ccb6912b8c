// Rounding to floating-point formats of up to eight bits: one pass to values or to codes, for the CPU.
//
// Every decision is that of lightning_eff/functional/numerics/float_format.py (same hash of the element's position, same
// comparisons): a test holds both equal bit for bit. Blocks of BLOCK elements, so results do not depend on the number
// of threads. Compile with -ffp-contract=off.
//
// Element types: 0 = float32, 1 = bfloat16, 2 = codes (uint8, output alone).

#include "common.h"

namespace {

constexpr float NEAREST = 12582912.0f;  // 1.5 * 2^23: adding it to y <= 256 rounds y to an integer, ties to even

struct Format {
    int32_t max_bits;        // largest value, as bits
    int32_t min_power_bits;  // 2^(1 - bias), as bits
    int32_t mantissa;        // m
    int32_t sign_shift;      // e + m
    int32_t nan_code, inf_code;
    bool saturate;           // Inf becomes the largest value
};

// y = |x| / step rounded, and the bits of the power of two that starts x's binade (no less than 2^(1 - bias)).
template <bool STOCHASTIC>
inline float rounded(int32_t magnitude, const Format& f, int64_t j, uint32_t seed, int32_t* power) {
    const int32_t a = std::min(magnitude, f.max_bits);
    *power = std::max(a & INFINITE, f.min_power_bits);
    // 1 / step = 2^m / power
    const float y = as_float(a) * as_float(0x7F000000 - *power + (f.mantissa << 23));
    if (!STOCHASTIC) return (y + NEAREST) - NEAREST;  // std::rint followed by a cast would not be vectorised
    const int32_t u = random_23(j, seed);
    const float lower = std::floor(y);
    return lower + (static_cast<float>(u) < (y - lower) * 8388608.0f ? 1.0f : 0.0f);
}

template <bool STOCHASTIC, class In, class Out>
void value_block(const In* x, Out* out, int64_t count, const Format f, uint32_t seed) {
    for (int64_t j = 0; j < count; ++j) {
        const int32_t bits = as_int(read(x, j)), magnitude = bits & MAGNITUDE;
        int32_t power;
        const float y = rounded<STOCHASTIC>(magnitude, f, j, seed, &power);
        int32_t q = as_int(y * as_float(power - (f.mantissa << 23)));
        const int32_t special = magnitude > INFINITE ? NOT_A_NUMBER : INFINITE;
        q = magnitude > INFINITE || (magnitude == INFINITE && !f.saturate) ? special : q;
        write(out, j, q | (bits & ~MAGNITUDE));  // every value is exact in bfloat16
    }
}

template <bool STOCHASTIC, class In>
bool code_block(const In* x, uint8_t* out, int64_t count, const Format f, uint32_t seed) {
    const int32_t propagate = -static_cast<int32_t>(!f.saturate);
    int32_t bad = 0;
    #pragma omp simd reduction(|:bad)
    for (int64_t j = 0; j < count; ++j) {
        const int32_t bits = as_int(read(x, j)), magnitude = bits & MAGNITUDE;
        int32_t power;
        const float y = rounded<STOCHASTIC>(magnitude, f, j, seed, &power);
        int32_t code = static_cast<int32_t>(y) + (((power - f.min_power_bits) >> 23) << f.mantissa);
        // Masks instead of branches, which would keep the loop from being vectorised.
        const int32_t nan = -static_cast<int32_t>(magnitude > INFINITE);
        const int32_t inf = -static_cast<int32_t>(magnitude == INFINITE) & propagate;
        code = (code & ~(nan | inf)) | (nan & f.nan_code) | (inf & f.inf_code);
        bad |= nan | inf;
        out[j] = static_cast<uint8_t>(code | ((bits < 0) << f.sign_shift));
    }
    return bad && f.nan_code < 0;
}

template <bool STOCHASTIC, class In>
bool convert(const In* x, int64_t n, const Format& f, uint64_t seed, void* out, int out_type, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int32_t bad = 0;
    #pragma omp parallel for num_threads(threads) reduction(|:bad) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        const uint32_t row = STOCHASTIC ? row_seed(seed, b) : 0;
        if (out_type == 0) value_block<STOCHASTIC>(x + begin, static_cast<float*>(out) + begin, count, f, row);
        else if (out_type == 1) value_block<STOCHASTIC>(x + begin, static_cast<uint16_t*>(out) + begin, count, f, row);
        else bad |= code_block<STOCHASTIC>(x + begin, static_cast<uint8_t*>(out) + begin, count, f, row);
    }
    return bad;
}

template <class In>
bool convert(const In* x, int64_t n, const Format& f, bool stochastic, uint64_t seed, void* out, int out_type,
             int threads) {
    return stochastic ? convert<true>(x, n, f, seed, out, out_type, threads)
                      : convert<false>(x, n, f, seed, out, out_type, threads);
}

}  // namespace

extern "C" {

// format: {bits of the largest value, bits of 2^(1 - bias), m, e + m, NaN code or -1, Inf code (that of NaN where
// there is none), saturate Inf}. *bad receives 1 if codes were asked for and a NaN or Inf has none.
void eff_float_format(const void* x, int type, int64_t n, const int32_t* format, int stochastic, uint64_t seed,
                      void* out, int out_type, int32_t* bad, int threads) {
    const Format f{format[0], format[1], format[2], format[3], format[4], format[5], format[6] != 0};
    *bad = type == 0 ? convert(static_cast<const float*>(x), n, f, stochastic != 0, seed, out, out_type, threads)
                     : convert(static_cast<const uint16_t*>(x), n, f, stochastic != 0, seed, out, out_type, threads);
}

}  // extern "C"
