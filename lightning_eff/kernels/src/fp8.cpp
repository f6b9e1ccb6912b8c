// FP8 casts for the CPU: one pass from float32 or bfloat16 to codes and to their exact bfloat16 values, and back; with a
// scale for the tensor, or for each row and column of a matrix.
//
// Round to nearest, ties to even, saturating: the values torch's casts give after clamping. A test compares all inputs.
// Element types of inputs: 0 = float32, 1 = bfloat16. Formats: 0 = E4M3 (bias 7), 1 = E5M2 (bias 15).

#include "common.h"

#include <vector>

namespace {

// down multiplies codes back, up multiplies the tensor before the cast: NaN and 0 for a maximum that is not finite.
inline void scale_of(float max_abs, float largest, int power_of_two, float& down, float& up) {
    if (!std::isfinite(max_abs)) { down = as_float(NOT_A_NUMBER); up = 0.0f; return; }
    up = static_cast<float>(static_cast<double>(largest) / std::max(static_cast<double>(max_abs), 1e-12));
    if (power_of_two) { int exponent; std::frexp(up, &exponent); up = std::ldexp(1.0f, exponent - 1); }
    down = 1.0f / up;
}

// Bits of the largest magnitude of a row, and of each column so far (`columns`, may be null); as integers NaN is above
// Inf, and both are above all numbers.
template <class In>
int32_t largest_bits(const In* x, int64_t n, int32_t* columns) {
    int32_t top = 0;
    if (columns) {
        #pragma omp simd reduction(max:top)
        for (int64_t j = 0; j < n; ++j) {
            const int32_t magnitude = as_int(read(x, j)) & MAGNITUDE;
            top = std::max(top, magnitude);
            const int32_t before = columns[j];
            columns[j] = before > magnitude ? before : magnitude;
        }
    } else {
        #pragma omp simd reduction(max:top)
        for (int64_t j = 0; j < n; ++j) top = std::max(top, as_int(read(x, j)) & MAGNITUDE);
    }
    return top;
}

// Where the codes of a matrix with a scale for each row (or column) go: (scales, bytes, values); bytes or values may be
// null, and nothing is made where scales is.
struct Lines { float* scales; uint8_t* codes; uint16_t* values; };

template <int MANTISSA, int BIAS>
struct Float8 {
    static constexpr int DROP = 23 - MANTISSA;
    static constexpr int32_t SMALLEST_NORMAL = (127 + 1 - BIAS) << 23;      // bits of 2^(1-bias)
    static constexpr int32_t REBIAS = (127 - BIAS) << MANTISSA;
    static constexpr float STEPS = static_cast<float>(1 << (BIAS + MANTISSA - 1));    // subnormal steps in one

    // Adding and taking away 1.5 * 2^(23 + exponent of a step) rounds to a multiple of the step, ties to even. The step
    // is the last mantissa bit of the magnitude's binade, and that of the smallest normal number below it.
    static inline int32_t round_bits(float magnitude) {
        const int32_t binade = std::max(as_int(magnitude) & INFINITE, SMALLEST_NORMAL);
        const float magic = as_float(binade + (DROP << 23) + (1 << 22));
        return as_int((magnitude + magic) - magic);
    }

    static inline int32_t round_signed(float y, float largest) {
        return round_bits(std::min(largest, std::fabs(y))) | (as_int(y) & static_cast<int32_t>(0x80000000));
    }

    // Float32 bits of FP8 numbers as bfloat16 and as bytes; either may be null.
    static inline void put(const int32_t* bits, int64_t count, uint8_t* codes, uint16_t* values) {
        if (values) for (int64_t j = 0; j < count; ++j) values[j] = static_cast<uint16_t>(static_cast<uint32_t>(bits[j]) >> 16);
        if (codes) for (int64_t j = 0; j < count; ++j) {
            const int32_t magnitude = bits[j] & MAGNITUDE;
            const int32_t normal = (magnitude >> DROP) - REBIAS, sub = static_cast<int32_t>(as_float(magnitude) * STEPS);
            codes[j] = static_cast<uint8_t>((magnitude < SMALLEST_NORMAL ? sub : normal) | ((bits[j] >> 24) & 0x80));
        }
    }

    // Returns the bits of max |x|, see largest_bits.
    template <class In>
    static int32_t encode(const In* x, int64_t n, float inverse, float largest, uint8_t* codes, uint16_t* values, int threads) {
        int32_t seen = 0;
        #pragma omp parallel for num_threads(threads) reduction(max:seen) if (n >= PARALLEL)
        for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; ++b) {
            const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
            int32_t bits[BLOCK];
            for (int64_t j = 0; j < count; ++j) {
                const float value = read(x, begin + j), y = value * inverse;
                seen = std::max(seen, as_int(value) & MAGNITUDE);
                bits[j] = round_signed(y, largest);
            }
            put(bits, count, codes ? codes + begin : nullptr, values ? values + begin : nullptr);
        }
        return seen;
    }

    // One row; `up(j)` multiplies element j, and makes it zero, whatever it is, where it is zero.
    template <class In, class Up>
    static void encode_row(const In* x, int64_t n, Up up, float largest, uint8_t* codes, uint16_t* values) {
        for (int64_t begin = 0; begin < n; begin += BLOCK) {
            const int64_t count = std::min(BLOCK, n - begin);
            int32_t bits[BLOCK];
            for (int64_t j = 0; j < count; ++j) {
                const float scale = up(begin + j);
                bits[j] = round_signed(scale == 0.0f ? 0.0f : read(x, begin + j) * scale, largest);
            }
            put(bits, count, codes ? codes + begin : nullptr, values ? values + begin : nullptr);
        }
    }

    // A row is cast while it is in the cache from the search for its maximum. Columns take a second pass over the matrix.
    template <class In>
    static void encode_lines(const In* x, int64_t rows, int64_t cols, float largest, int power_of_two, Lines by_row,
                             Lines by_column, int threads) {
        const int64_t parts = rows * cols >= PARALLEL ? std::min<int64_t>(threads, rows) : 1;
        std::vector<int32_t> tops(by_column.scales ? parts * cols : 0);
        #pragma omp parallel for num_threads(parts) if (parts > 1)
        for (int64_t p = 0; p < parts; ++p)
            for (int64_t r = p * rows / parts; r < (p + 1) * rows / parts; ++r) {
                const int32_t top = largest_bits(x + r * cols, cols, by_column.scales ? tops.data() + p * cols : nullptr);
                if (!by_row.scales) continue;
                float up; scale_of(as_float(top), largest, power_of_two, by_row.scales[r], up);
                encode_row(x + r * cols, cols, [up](int64_t) { return up; }, largest,
                           by_row.codes ? by_row.codes + r * cols : nullptr,
                           by_row.values ? by_row.values + r * cols : nullptr);
            }
        if (!by_column.scales) return;
        std::vector<float> ups(cols);
        for (int64_t c = 0; c < cols; ++c) {
            int32_t top = tops[c];
            for (int64_t p = 1; p < parts; ++p) top = std::max(top, tops[p * cols + c]);
            scale_of(as_float(top), largest, power_of_two, by_column.scales[c], ups[c]);
        }
        const float* each = ups.data();
        #pragma omp parallel for num_threads(parts) if (parts > 1)
        for (int64_t r = 0; r < rows; ++r)
            encode_row(x + r * cols, cols, [each](int64_t j) { return each[j]; }, largest,
                       by_column.codes ? by_column.codes + r * cols : nullptr,
                       by_column.values ? by_column.values + r * cols : nullptr);
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

template <class Format>
void encode_lines_any(const void* x, int type, int64_t rows, int64_t cols, float largest, int power_of_two, Lines by_row,
                      Lines by_column, int threads) {
    if (type == 0) Format::encode_lines(static_cast<const float*>(x), rows, cols, largest, power_of_two, by_row, by_column, threads);
    else Format::encode_lines(static_cast<const uint16_t*>(x), rows, cols, largest, power_of_two, by_row, by_column, threads);
}

}  // namespace

extern "C" {

// scale[0]: multiplies codes back; scale[1]: multiplies the tensor before the cast. NaN and 0 for a non-finite maximum.
void eff_fp8_scale(const float* max_abs, float largest, int power_of_two, float* scale) {
    scale_of(*max_abs, largest, power_of_two, scale[0], scale[1]);
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
    if (observed && !std::isfinite(*observed)) scale[0] = as_float(NOT_A_NUMBER);
    if (scale[1] == 0.0f || (observed && !std::isfinite(*observed))) {
        if (codes) std::memset(codes, 0, n);
        if (values) std::memset(values, 0, 2 * n);
    }
}

// Codes of a matrix with a scale for each row, for each column, or both (in two readings of it): scales that multiply
// codes back, bytes, bfloat16 values. Bytes or values may be null; null scales leave that direction out. Where a row (or
// column) holds NaN or Inf, its scale is NaN and its codes are zero.
void eff_fp8_encode_lines(const void* x, int type, int64_t rows, int64_t cols, int format, int power_of_two,
                          float* row_scales, uint8_t* row_codes, uint16_t* row_values, float* column_scales,
                          uint8_t* column_codes, uint16_t* column_values, int threads) {
    const Lines by_row{row_scales, row_codes, row_values}, by_column{column_scales, column_codes, column_values};
    if (format == 0) encode_lines_any<E4M3>(x, type, rows, cols, 448.0f, power_of_two, by_row, by_column, threads);
    else encode_lines_any<E5M2>(x, type, rows, cols, 57344.0f, power_of_two, by_row, by_column, threads);
}

// bfloat16 values of finite codes.
void eff_fp8_decode(const uint8_t* codes, int64_t n, int format, uint16_t* values, int threads) {
    if (format == 0) E4M3::decode(codes, n, values, threads);
    else E5M2::decode(codes, n, values, threads);
}

}  // extern "C"
