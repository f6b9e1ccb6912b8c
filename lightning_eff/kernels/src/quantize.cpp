// Quantisers, packing and epilogues for the CPU. Plain C interface, no torch headers: compiles in seconds.
//
// Every function processes blocks of BLOCK elements, so results do not depend on the number of threads. The random
// bits and every rounding decision are those of lightning_eff/functional (same hash, same comparisons): a test holds
// both equal bit for bit. Compile with -ffp-contract=off.
//
// Element types of inputs: 0 = float32, 1 = bfloat16.

#include "common.h"

#include <vector>

namespace {

constexpr double FLAT = 0.87;          // mean(|x|) / rms above which SAWB's formula does not hold
constexpr float TINY = 1.17549435e-38f;  // smallest normal float32

// Pointer to block `b` of an input as float32; bfloat16 is widened into `buffer`.
inline const float* block_of(const void* x, int type, int64_t begin, int64_t count, float* buffer) {
    if (type == 0) return static_cast<const float*>(x) + begin;
    const uint16_t* h = static_cast<const uint16_t*>(x) + begin;
    for (int64_t j = 0; j < count; ++j) buffer[j] = widen(h[j]);
    return buffer;
}

struct Moments { double abs = 0, square = 0, nonzero = 0; int32_t max_bits = 0; int32_t negative = 0; };

Moments block_moments(const float* x, int64_t count) {
    float abs = 0, square = 0; int32_t nonzero = 0, max_bits = 0, negative = 0;
    #pragma omp simd reduction(+:abs, square, nonzero, negative) reduction(max:max_bits)
    for (int64_t j = 0; j < count; ++j) {
        const int32_t bits = as_int(x[j]), magnitude = bits & MAGNITUDE;
        const float a = as_float(magnitude);
        abs += a; square += a * a;
        nonzero += magnitude != 0;
        negative += x[j] < 0;
        max_bits = std::max(max_bits, magnitude);
    }
    Moments m;
    m.abs = abs; m.square = square; m.nonzero = nonzero; m.max_bits = max_bits; m.negative = negative != 0;
    return m;
}

Moments moments(const void* x, int type, int64_t n, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    std::vector<Moments> partial(blocks);
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        float buffer[BLOCK];
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        partial[b] = block_moments(block_of(x, type, begin, count, buffer), count);
    }
    Moments total;
    for (const Moments& p : partial) {
        total.abs += p.abs; total.square += p.square; total.nonzero += p.nonzero;
        total.max_bits = std::max(total.max_bits, p.max_bits); total.negative |= p.negative;
    }
    return total;
}

int32_t block_max_bits(const float* x, int64_t count) {
    int32_t top = 0;
    #pragma omp simd reduction(max:top)
    for (int64_t j = 0; j < count; ++j) top = std::max(top, as_int(x[j]) & MAGNITUDE);
    return top;
}

int32_t max_bits_of(const void* x, int type, int64_t n, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int32_t result = 0;
    #pragma omp parallel for num_threads(threads) reduction(max:result) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        float buffer[BLOCK];
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        result = std::max(result, block_max_bits(block_of(x, type, begin, count, buffer), count));
    }
    return result;
}

void pack_block(const int8_t* codes, uint8_t* packed, int64_t count) {
    const int64_t pairs = count / 2;
    for (int64_t j = 0; j < pairs; ++j) {
        uint16_t two; std::memcpy(&two, codes + 2 * j, 2);
        packed[j] = static_cast<uint8_t>((two & 0x0F) | ((two >> 4) & 0xF0));
    }
    if (count % 2) packed[pairs] = static_cast<uint8_t>(codes[count - 1] & 0x0F);
}

void luq_block(const float* x, int8_t* codes, int64_t count, float inverse, int32_t top_bits, uint32_t seed) {
    constexpr int32_t ONE = 0x3F800000;
    for (int64_t j = 0; j < count; ++j) {
        const int32_t u = random_23(j, seed);
        const float y = x[j] * inverse;
        const int32_t bits = as_int(y), magnitude = bits & MAGNITUDE;
        // |y| < 1: up to 1 with probability |y|.  |y| >= 1: up to the next power of two with probability mantissa/2^23.
        const int32_t under = static_cast<float>(u) < as_float(magnitude) * 8388608.0f ? ONE : 0;
        const int32_t power = (magnitude + (0x7FFFFF - u)) & INFINITE;
        const int32_t level = std::min(magnitude < ONE ? under : power, top_bits);
        const int32_t value = static_cast<int32_t>(as_float(level));
        codes[j] = static_cast<int8_t>(bits < 0 ? -value : value);
    }
}

inline bool passes(float x) { return !(x <= 0.0f); }
inline bool passes(uint16_t x) { return passes(widen(x)); }

template <class T>
void relu_blocks(const T* x, int64_t n, T* y, uint8_t* mask, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        uint8_t kept[BLOCK] = {};
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        for (int64_t j = 0; j < count; ++j) {
            const bool pass = passes(x[begin + j]);
            kept[j] = pass;
            y[begin + j] = pass ? x[begin + j] : T(0);
        }
        for (int64_t j = 0; j < (count + 7) / 8; ++j) {
            uint64_t eight; std::memcpy(&eight, kept + 8 * j, 8);
            mask[begin / 8 + j] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
        }
    }
}

template <class T>
void mask_blocks(const T* grad, const uint8_t* mask, int64_t n, T* out, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        T keep[BLOCK];
        for (int64_t j = 0; j < (count + 7) / 8; ++j)
            for (int64_t k = 0; k < 8; ++k) keep[8 * j + k] = static_cast<T>(-((mask[begin / 8 + j] >> k) & 1));
        for (int64_t j = 0; j < count; ++j) out[begin + j] = grad[begin + j] & keep[j];
    }
}

template <class Out> struct Store;
template <> struct Store<float> { static float from(float v) { return v; } };
template <> struct Store<uint16_t> {  // bfloat16, round to nearest even; NaN stays NaN
    static uint16_t from(float v) {
        const uint32_t bits = static_cast<uint32_t>(as_int(v));
        const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        return static_cast<uint16_t>((bits & MAGNITUDE) > INFINITE ? (bits >> 16) | 0x40 : rounded);
    }
};

inline float widen(int32_t x) { return static_cast<float>(x); }

template <class In, class Out>
void scale_rows(const In* acc, int64_t rows, int64_t cols, float scale, const float* bias, Out* out, int64_t stride,
                int threads) {
    #pragma omp parallel for num_threads(threads) if (rows * cols >= PARALLEL)
    for (int64_t r = 0; r < rows; ++r) {
        const In* a = acc + r * cols; Out* o = out + r * stride;
        if (bias) for (int64_t c = 0; c < cols; ++c) o[c] = Store<Out>::from(widen(a[c]) * scale + bias[c]);
        else for (int64_t c = 0; c < cols; ++c) o[c] = Store<Out>::from(widen(a[c]) * scale);
    }
}

template <class Out>
void scale_any(const void* acc, int type, int64_t rows, int64_t cols, float scale, const float* bias, Out* out,
               int64_t stride, int threads) {
    if (type == 0) scale_rows(static_cast<const float*>(acc), rows, cols, scale, bias, out, stride, threads);
    else if (type == 1) scale_rows(static_cast<const int32_t*>(acc), rows, cols, scale, bias, out, stride, threads);
    else scale_rows(static_cast<const uint16_t*>(acc), rows, cols, scale, bias, out, stride, threads);
}

template <class In, class Out>
void scale_vectors(const In* acc, int64_t rows, int64_t cols, const float* left, const float* right, float factor,
                   const float* bias, Out* out, int threads) {
    #pragma omp parallel for num_threads(threads) if (rows * cols >= PARALLEL)
    for (int64_t r = 0; r < rows; ++r) {
        const In* a = acc + r * cols; Out* o = out + r * cols;
        const float scale = left[r] * factor;
        if (bias) for (int64_t c = 0; c < cols; ++c) o[c] = Store<Out>::from(widen(a[c]) * scale * right[c] + bias[c]);
        else for (int64_t c = 0; c < cols; ++c) o[c] = Store<Out>::from(widen(a[c]) * scale * right[c]);
    }
}

template <class Out>
void scale_vectors_any(const void* acc, int type, int64_t rows, int64_t cols, const float* left, const float* right,
                       float factor, const float* bias, Out* out, int threads) {
    if (type == 0) scale_vectors(static_cast<const float*>(acc), rows, cols, left, right, factor, bias, out, threads);
    else if (type == 1) scale_vectors(static_cast<const int32_t*>(acc), rows, cols, left, right, factor, bias, out, threads);
    else scale_vectors(static_cast<const uint16_t*>(acc), rows, cols, left, right, factor, bias, out, threads);
}

inline void copy_bytes(int8_t* to, const int8_t* from, int64_t bytes) {
    int64_t i = 0;
    for (; i + 64 <= bytes; i += 64) std::memcpy(to + i, from + i, 64);
    std::memcpy(to + i, from + i, bytes - i);
}

float power_of_two_above(float alpha) {
    int exponent; const float mantissa = std::frexp(alpha, &exponent);
    return std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}

}  // namespace

extern "C" {

// Largest magnitude; NaN if any element is NaN.
void eff_max_abs(const void* x, int type, int64_t n, float* result, int threads) {
    *result = as_float(max_bits_of(x, type, n, threads));
}

// SAWB scale. unsigned_mode: 0 signed; 1 "mirror5" and 2 "reference", both only if no element is negative.
// coefficients: {signed c1, c2, mirror5 c1, c2, reference c1, c2}. Writes scale, and 1 to *is_unsigned for codes 0..15.
void eff_sawb_scale(const void* x, int type, int64_t n, int unsigned_mode, const float* coefficients, float* scale,
                    int32_t* is_unsigned, int threads) {
    const Moments m = moments(x, type, n, threads);
    const bool positive = unsigned_mode != 0 && !m.negative && m.nonzero > 0;
    const int row = positive ? unsigned_mode : 0;
    const double count = row == 1 ? m.nonzero : static_cast<double>(n);
    const float max_abs = as_float(m.max_bits);
    const double rms = count > 0 ? std::sqrt(m.square / count) : 0.0, mean = count > 0 ? m.abs / count : 0.0;
    float clip = static_cast<float>(coefficients[2 * row] * rms + coefficients[2 * row + 1] * mean);
    if (!(clip > 0.0f && std::isfinite(clip))) clip = row == 2 ? max_abs / 2 : max_abs;
    if (row != 2 && mean > FLAT * rms) clip = std::min(max_abs, static_cast<float>(2 * std::max(rms, mean)));
    const float steps = row == 0 ? 7.0f : row == 1 ? 15.0f : 7.5f;
    const float value = clip / steps;
    *scale = std::isfinite(max_abs) ? std::max(value, TINY) : as_float(NOT_A_NUMBER);
    *is_unsigned = positive;
}

// Codes round(x / scale) clamped to -7..7 or 0..15, and the same packed two to a byte (packed may be null).
void eff_sawb_codes(const void* x, int type, int64_t n, const float* scale, int is_unsigned, int8_t* codes,
                    uint8_t* packed, int threads) {
    const float low = is_unsigned ? 0.0f : -7.0f, high = is_unsigned ? 15.0f : 7.0f;
    const bool finite = std::isfinite(*scale);
    const float inverse = finite ? 1.0f / *scale : 0.0f;
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        float buffer[BLOCK];
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        int8_t* c = codes + begin;
        if (finite) {
            const float* p = block_of(x, type, begin, count, buffer);
            for (int64_t j = 0; j < count; ++j)
                c[j] = static_cast<int8_t>(static_cast<int32_t>(std::rint(std::min(std::max(p[j] * inverse, low), high))));
        } else std::memset(c, 0, count);
        if (packed) pack_block(c, packed + begin / 2, count);
    }
}

// alpha = max_abs * 2^-(levels-1), at least the smallest normal number, NaN when max_abs is not finite.
void eff_luq_scale(const float* max_abs, int levels, int power_of_two, float* alpha) {
    const float value = std::max(std::ldexp(*max_abs, 1 - levels), TINY);
    *alpha = !std::isfinite(*max_abs) ? as_float(NOT_A_NUMBER) : power_of_two ? power_of_two_above(value) : value;
}

// LUQ codes 0, +-1, +-2, ... +-2^(levels-1); levels <= 7 so that a code fits int8. `observed` (may be null) receives
// the true largest magnitude, measured in the same pass, for the in-hindsight estimate.
void eff_luq_codes(const void* x, int type, int64_t n, const float* alpha, const float* max_abs, int levels,
                   uint64_t seed, int8_t* codes, float* observed, int threads) {
    const bool finite = std::isfinite(*alpha);
    const float top = std::ldexp(1.0f, levels - 1);
    float inverse = finite ? 1.0f / *alpha : 0.0f;
    if (finite && *max_abs >= *alpha * top && *max_abs * inverse < top) inverse = std::nextafter(inverse, INFINITY);
    const int32_t top_bits = as_int(top);
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    int32_t largest = 0;
    #pragma omp parallel for num_threads(threads) reduction(max:largest) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        float buffer[BLOCK];
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        const float* p = block_of(x, type, begin, count, buffer);
        if (observed) largest = std::max(largest, block_max_bits(p, count));
        if (finite) luq_block(p, codes + begin, count, inverse, top_bits, row_seed(seed, b));
        else std::memset(codes + begin, 0, count);
    }
    if (observed) *observed = as_float(largest);
}

// A hash of 64 evenly spaced words: tells at almost no cost whether a weight was written to behind autograd's back.
uint64_t eff_fingerprint(const void* data, int64_t bytes) {
    const auto* bytes_of = static_cast<const char*>(data);
    const int64_t words = bytes / 4, step = std::max<int64_t>(words / 64, 1);
    uint64_t hash = 1469598103934665603ull;
    for (int64_t i = 0; i < words; i += step) {
        uint32_t word; std::memcpy(&word, bytes_of + 4 * i, 4);
        hash = (hash ^ word) * 1099511628211ull;
    }
    return hash;
}

// Two codes per byte -> int8. Low nibble first.
void eff_unpack(const uint8_t* packed, int64_t n, int is_unsigned, int8_t* codes, int threads) {
    const int64_t pairs = n / 2;
    const int sign = is_unsigned ? 0 : 8;
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < (pairs + BLOCK - 1) / BLOCK; ++b) {
        const int64_t end = std::min(pairs, (b + 1) * BLOCK);
        for (int64_t j = b * BLOCK; j < end; ++j) {
            const int lo = ((packed[j] & 0x0F) ^ sign) - sign, hi = ((packed[j] >> 4) ^ sign) - sign;
            const uint16_t two = static_cast<uint16_t>((lo & 0xFF) | (hi << 8));
            std::memcpy(codes + 2 * j, &two, 2);
        }
    }
    if (n % 2) codes[n - 1] = static_cast<int8_t>(((packed[pairs] & 0x0F) ^ sign) - sign);
}

// ReLU in place of torch's, bit for bit, and one bit per element that tells where the gradient passes (x <= 0 stops it,
// NaN passes, as in torch). Eight elements a byte, first element lowest.
void eff_relu(const void* x, int type, int64_t n, void* y, uint8_t* mask, int threads) {
    if (type == 0) relu_blocks(static_cast<const float*>(x), n, static_cast<float*>(y), mask, threads);
    else relu_blocks(static_cast<const uint16_t*>(x), n, static_cast<uint16_t*>(y), mask, threads);
}

void eff_relu_grad(const void* grad, int type, const uint8_t* mask, int64_t n, void* out, int threads) {
    if (type == 0) mask_blocks(static_cast<const uint32_t*>(grad), mask, n, static_cast<uint32_t*>(out), threads);
    else mask_blocks(static_cast<const uint16_t*>(grad), mask, n, static_cast<uint16_t*>(out), threads);
}

// out[r, c] = acc[r, c] * (*scale_a * *scale_b * factor) + bias[c]; rows of `out` are `stride` elements apart.
// acc_type: 0 float32 (exact integers), 1 int32, 2 bfloat16. out_type: 0 float32, 1 bfloat16.
void eff_scale(const void* acc, int acc_type, int64_t rows, int64_t cols, const float* scale_a, const float* scale_b,
               float factor, const float* bias, void* out, int out_type, int64_t stride, int threads) {
    const float scale = *scale_a * *scale_b * factor;
    if (out_type == 0) scale_any(acc, acc_type, rows, cols, scale, bias, static_cast<float*>(out), stride, threads);
    else scale_any(acc, acc_type, rows, cols, scale, bias, static_cast<uint16_t*>(out), stride, threads);
}

// out[r, c] = acc[r, c] * (scale_a[r] * factor) * scale_b[c] + bias[c], all contiguous; types as in eff_scale.
void eff_scale_rows(const void* acc, int acc_type, int64_t rows, int64_t cols, const float* scale_a, const float* scale_b,
                    float factor, const float* bias, void* out, int out_type, int threads) {
    if (out_type == 0) scale_vectors_any(acc, acc_type, rows, cols, scale_a, scale_b, factor, bias, static_cast<float*>(out), threads);
    else scale_vectors_any(acc, acc_type, rows, cols, scale_a, scale_b, factor, bias, static_cast<uint16_t*>(out), threads);
}

// Gather for convolution as a product:
//   out[n, z, y, x, t, :] = src[n, z*step[0] + tap[0][t], y*step[1] + tap[1][t], x*step[2] + tap[2][t], :],
// zero outside. src is (images, size[0], size[1], size[2], channels) int8, out (images, out_size..., taps, channels);
// tap is (3, taps).
void eff_gather(const int8_t* src, int64_t images, const int64_t* size, int64_t channels, const int64_t* out_size,
                const int64_t* step, int64_t taps, const int64_t* tap, int8_t* out, int threads) {
    // Taps that follow each other along the last axis read one contiguous piece of src: copy it at once.
    struct Run { int64_t first, count; };
    std::vector<Run> runs;
    for (int64_t t = 0; t < taps; ++t) {
        const bool follows = t && tap[t] == tap[t - 1] && tap[taps + t] == tap[taps + t - 1] &&
                             tap[2 * taps + t] == tap[2 * taps + t - 1] + 1;
        if (follows) ++runs.back().count; else runs.push_back({t, 1});
    }
    const int64_t row_bytes = out_size[2] * taps * channels;
    const int64_t rows = images * out_size[0] * out_size[1];
    #pragma omp parallel for num_threads(threads) if (rows * row_bytes >= PARALLEL)
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t y = r % out_size[1], z = r / out_size[1] % out_size[0], n = r / out_size[1] / out_size[0];
        for (const Run& run : runs) {
            const int64_t sz = z * step[0] + tap[run.first], sy = y * step[1] + tap[taps + run.first];
            const int64_t dx = tap[2 * taps + run.first], bytes = run.count * channels;
            const bool inside = sz >= 0 && sz < size[0] && sy >= 0 && sy < size[1];
            const int8_t* line = src + ((n * size[0] + sz) * size[1] + sy) * size[2] * channels;
            int8_t* o = out + r * row_bytes + run.first * channels;
            for (int64_t x = 0; x < out_size[2]; ++x, o += taps * channels) {
                const int64_t sx = x * step[2] + dx;
                if (inside && sx >= 0 && sx + run.count <= size[2]) { copy_bytes(o, line + sx * channels, bytes); continue; }
                for (int64_t t = 0; t < run.count; ++t) {
                    if (inside && sx + t >= 0 && sx + t < size[2]) std::memcpy(o + t * channels, line + (sx + t) * channels, channels);
                    else std::memset(o + t * channels, 0, channels);
                }
            }
        }
    }
}

}  // extern "C"
