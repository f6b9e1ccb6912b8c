// FP8 casts for the CPU: one pass from float32 or bfloat16 to codes and to their exact bfloat16 values, and back.
//
// Round to nearest, ties to even, saturating: the values torch's casts give after clamping. A test compares all inputs.
// Element types of inputs: 0 = float32, 1 = bfloat16. Formats: 0 = E4M3 (bias 7), 1 = E5M2 (bias 15).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 2048, PARALLEL = 32768;

inline int32_t as_int(float x) { int32_t i; std::memcpy(&i, &x, 4); return i; }
inline float as_float(int32_t i) { float x; std::memcpy(&x, &i, 4); return x; }
inline float load(const float* x, int64_t j) { return x[j]; }
inline float load(const uint16_t* x, int64_t j) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(x[j]) << 16)); }

template <int MANTISSA, int BIAS>
struct Float8 {
    static constexpr int DROP = 23 - MANTISSA;
    static constexpr int32_t SMALLEST_NORMAL = (127 + 1 - BIAS) << 23;      // bits of 2^(1-bias)
    static constexpr int32_t REBIAS = (127 - BIAS) << MANTISSA;
    // Adding and taking away 1.5 * 2^(23 + step exponent) rounds to a multiple of the subnormal step, ties to even.
    static float magic() { return std::ldexp(1.5f, 23 + 1 - BIAS - MANTISSA); }

    static inline int32_t round_bits(float magnitude, float magic) {
        const int32_t b = as_int(magnitude);
        const int32_t normal = (b + ((1 << (DROP - 1)) - 1) + ((b >> DROP) & 1)) & ~((1 << DROP) - 1);
        const float sub = (magnitude + magic) - magic;
        return b < SMALLEST_NORMAL ? as_int(sub) : normal;
    }

    // Returns the bits of max |x|; as integers NaN is above Inf, and both are above all numbers.
    template <class In>
    static int32_t encode(const In* x, int64_t n, float inverse, float largest, uint8_t* codes, uint16_t* values, int threads) {
        const float m = magic(), steps = std::ldexp(1.0f, BIAS + MANTISSA - 1);
        int32_t seen = 0;
        #pragma omp parallel for num_threads(threads) reduction(max:seen) if (n >= PARALLEL)
        for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; ++b) {
            const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
            int32_t bits[BLOCK];
            for (int64_t j = 0; j < count; ++j) {
                const float value = load(x, begin + j), y = value * inverse;
                seen = std::max(seen, as_int(value) & 0x7FFFFFFF);
                const int32_t sign = as_int(y) & static_cast<int32_t>(0x80000000);
                bits[j] = round_bits(std::min(std::fabs(y), largest), m) | sign;
            }
            if (values) for (int64_t j = 0; j < count; ++j) values[begin + j] = static_cast<uint16_t>(static_cast<uint32_t>(bits[j]) >> 16);
            if (codes) for (int64_t j = 0; j < count; ++j) {
                const int32_t magnitude = bits[j] & 0x7FFFFFFF;
                const int32_t normal = (magnitude >> DROP) - REBIAS, sub = static_cast<int32_t>(as_float(magnitude) * steps);
                codes[begin + j] = static_cast<uint8_t>((magnitude < SMALLEST_NORMAL ? sub : normal) | ((bits[j] >> 24) & 0x80));
            }
        }
        return seen;
    }

    static void decode(const uint8_t* codes, int64_t n, uint16_t* values, int threads) {
        const float step = std::ldexp(1.0f, 1 - BIAS - MANTISSA);
        #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
        for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; ++b) {
            const int64_t end = std::min(n, (b + 1) * BLOCK);
            for (int64_t j = b * BLOCK; j < end; ++j) {
                const int32_t c = codes[j] & 0x7F, sign = (codes[j] & 0x80) << 24;
                const int32_t normal = (c + REBIAS) << DROP, sub = as_int(static_cast<float>(c) * step);
                const int32_t bits = (c < (1 << MANTISSA) ? sub : normal) | sign;
                values[j] = static_cast<uint16_t>(static_cast<uint32_t>(bits) >> 16);
            }
        }
    }
};

using E4M3 = Float8<3, 7>;
using E5M2 = Float8<2, 15>;

template <class Format>
int32_t encode_any(const void* x, int type, int64_t n, float inverse, float largest, uint8_t* codes, uint16_t* values, int threads) {
    return type == 0 ? Format::encode(static_cast<const float*>(x), n, inverse, largest, codes, values, threads)
                     : Format::encode(static_cast<const uint16_t*>(x), n, inverse, largest, codes, values, threads);
}

}  // namespace

extern "C" {

// scale[0]: multiplies codes back; scale[1]: multiplies the tensor before the cast. NaN and 0 for a non-finite maximum.
void eff_fp8_scale(const float* max_abs, float largest, int power_of_two, float* scale) {
    if (!std::isfinite(*max_abs)) { scale[0] = as_float(0x7FC00000); scale[1] = 0.0f; return; }
    float up = static_cast<float>(static_cast<double>(largest) / std::max(static_cast<double>(*max_abs), 1e-12));
    if (power_of_two) { int exponent; std::frexp(up, &exponent); up = std::ldexp(1.0f, exponent - 1); }
    scale[0] = 1.0f / up; scale[1] = up;
}

// Codes (may be null) and bfloat16 values (may be null) of cast(clamp(x * scale[1])). All zero when scale[1] is zero, and
// when the scale is not from this tensor (*observed receives max |x| then) and the tensor turns out to hold NaN or Inf;
// scale[0] becomes NaN in that case.
void eff_fp8_encode(const void* x, int type, int64_t n, float* scale, int format, uint8_t* codes, uint16_t* values,
                    float* observed, int threads) {
    int32_t seen = 0;
    if (scale[1] != 0.0f)
        seen = format == 0 ? encode_any<E4M3>(x, type, n, scale[1], 448.0f, codes, values, threads)
                           : encode_any<E5M2>(x, type, n, scale[1], 57344.0f, codes, values, threads);
    if (observed) *observed = as_float(seen);
    if (observed && !std::isfinite(*observed)) scale[0] = as_float(0x7FC00000);
    if (scale[1] == 0.0f || (observed && !std::isfinite(*observed))) {
        if (codes) std::memset(codes, 0, n);
        if (values) std::memset(values, 0, 2 * n);
    }
}

// bfloat16 values of finite codes.
void eff_fp8_decode(const uint8_t* codes, int64_t n, int format, uint16_t* values, int threads) {
    if (format == 0) E4M3::decode(codes, n, values, threads);
    else E5M2::decode(codes, n, values, threads);
}

}  // extern "C"
