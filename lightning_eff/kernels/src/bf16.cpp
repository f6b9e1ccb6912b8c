// bfloat16 weights: stochastic rounding, Kahan compensation, split and join, each in one pass over memory.
//
// The rules and the random bits are those of lightning_eff/functional/bf16.py; a test holds both equal bit for bit.
// Blocks of BLOCK elements are the rows of the random stream, so results do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 2048;      // elements per row of the random stream
constexpr int64_t PARALLEL = 32768;  // fewer elements than this stay on one thread
constexpr uint32_t MAGNITUDE = 0x7FFFFFFFu, INF = 0x7F800000u, QUIET = 0x400000u, LARGEST = 0x7F7F0000u;

inline float as_float(uint32_t i) { float x; std::memcpy(&x, &i, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t i; std::memcpy(&i, &x, 4); return i; }

inline uint32_t mix(uint32_t h) {  // lowbias32 (C. Wellons)
    h ^= h >> 16; h *= 0x7feb352du;
    h ^= h >> 15; h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

inline uint32_t row_seed(uint64_t seed, int64_t row) {
    return mix(mix(static_cast<uint32_t>(row) ^ mix(static_cast<uint32_t>(seed))) + static_cast<uint32_t>(seed >> 32));
}

inline uint16_t nearest(float x) {
    const uint32_t bits = as_bits(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return static_cast<uint16_t>(((bits & MAGNITUDE) > INF ? bits | QUIET : rounded) >> 16);
}

template <class Body>
void blocks_of(int64_t n, int threads, Body body) {
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; ++b) body(b, b * BLOCK, std::min(n, (b + 1) * BLOCK));
}

}  // namespace

extern "C" {

// out = x rounded up or down with the probabilities that make its mean x.
void eff_bf16_stochastic(const float* x, int64_t n, uint64_t seed, uint16_t* out, int threads) {
    blocks_of(n, threads, [=](int64_t row, int64_t begin, int64_t end) {
        const uint32_t start = row_seed(seed, row);
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t bits = as_bits(x[i]), magnitude = bits & MAGNITUDE;
            const uint32_t noise = mix(static_cast<uint32_t>(i - begin) * 0x9E3779B9u + start) >> 16;
            uint32_t rounded = bits + noise;
            rounded = (rounded & MAGNITUDE) >= INF ? (bits & ~MAGNITUDE) | LARGEST : rounded;
            const uint32_t special = magnitude > INF ? bits | QUIET : bits;
            out[i] = static_cast<uint16_t>((magnitude >= INF ? special : rounded) >> 16);
        }
    });
}

// d = update + c; w' = bf16(w + d); c' = bf16(d - (w' - w)), zero where it is not finite. In place.
void eff_bf16_kahan(uint16_t* weight, uint16_t* compensation, const float* update, int64_t n, int threads) {
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const float wide = as_float(static_cast<uint32_t>(weight[i]) << 16);
            const float d = update[i] + as_float(static_cast<uint32_t>(compensation[i]) << 16);
            const uint16_t next = nearest(wide + d);
            const float rest = d - (as_float(static_cast<uint32_t>(next) << 16) - wide);
            weight[i] = next;
            compensation[i] = (as_bits(rest) & MAGNITUDE) < INF ? nearest(rest) : uint16_t(0);
        }
    });
}

// hi is x rounded half away from zero, lo the 16 bits that are missing; NaN is cut.
void eff_bf16_split(const float* x, int64_t n, uint16_t* hi, uint16_t* lo, int threads) {
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t bits = as_bits(x[i]);
            hi[i] = static_cast<uint16_t>(((bits & MAGNITUDE) > INF ? bits | QUIET : bits + 0x8000u) >> 16);
            lo[i] = static_cast<uint16_t>(bits);  // the low half is the same whichever way hi was made
        }
    });
}

void eff_bf16_join(const uint16_t* hi, const int16_t* lo, int64_t n, float* out, int threads) {
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const uint32_t upper = static_cast<uint32_t>(hi[i]) << 16;
            const uint32_t cut = static_cast<uint16_t>(lo[i]), away = static_cast<uint32_t>(static_cast<int32_t>(lo[i]));
            out[i] = as_float(upper + ((upper & MAGNITUDE) > INF ? cut : away));
        }
    });
}

}  // extern "C"
