// Unbiased stochastic pruning in one pass, for the CPU. Every decision is that of lightning_eff/functional/numerics/lognormal.py
// (same hash of the element's position, same comparisons): a test holds both equal bit for bit.
//
// Element types: 0 = float32, 1 = bfloat16.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t BLOCK = 2048;      // elements per block, and per row of the random stream
constexpr int64_t PARALLEL = 32768;  // fewer elements than this stay on one thread

using std::int64_t;

inline uint32_t mix(uint32_t h) {
    h ^= h >> 16; h *= 0x7feb352du;
    h ^= h >> 15; h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

inline uint32_t row_seed(uint64_t seed, int64_t row) {
    return mix(mix(static_cast<uint32_t>(row) ^ mix(static_cast<uint32_t>(seed))) + static_cast<uint32_t>(seed >> 32));
}

inline uint32_t bits_of(float x) { uint32_t i; std::memcpy(&i, &x, 4); return i; }
inline uint32_t bits_of(uint16_t x) { return static_cast<uint32_t>(x) << 16; }
inline float value_of(uint32_t i) { float x; std::memcpy(&x, &i, 4); return x; }
inline void write(float* out, int64_t j, uint32_t bits) { out[j] = value_of(bits); }
inline void write(uint16_t* out, int64_t j, uint32_t bits) { out[j] = static_cast<uint16_t>(bits >> 16); }

template <class T>
int64_t prune(const T* x, int64_t n, float tau, uint64_t seed, T* out, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    const uint32_t tau_bits = bits_of(tau);
    int64_t zeros = 0;
    #pragma omp parallel for num_threads(threads) reduction(+:zeros) if (n >= PARALLEL)
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * BLOCK, count = std::min(BLOCK, n - begin);
        const uint32_t row = row_seed(seed, b);
        const T* p = x + begin;
        T* o = out + begin;
        uint32_t empty = 0;
        #pragma omp simd reduction(+:empty)
        for (int64_t j = 0; j < count; ++j) {
            const uint32_t bits = bits_of(p[j]), sign = bits & 0x80000000u;
            const float magnitude = value_of(bits & 0x7FFFFFFFu);
            const uint32_t hash = mix(static_cast<uint32_t>(j) * 0x9E3779B9u + row) >> 9;  // 23 bits
            const float u = static_cast<float>(static_cast<int32_t>(hash)) * 1.1920928955078125e-7f;
            // Masks instead of branches. NaN is not below tau and stays.
            const uint32_t below = -static_cast<uint32_t>(magnitude < tau);
            const uint32_t kept = -static_cast<uint32_t>(u * tau < magnitude);
            const uint32_t result = (bits & ~below) | (below & kept & (tau_bits | sign));
            empty += (result & 0x7FFFFFFFu) == 0;
            write(o, j, result);
        }
        zeros += empty;
    }
    return zeros;
}

}  // namespace

extern "C" {

// out may be x. *zeros receives the number of zeros in out.
void eff_prune(const void* x, int type, int64_t n, float tau, uint64_t seed, void* out, int64_t* zeros, int threads) {
    *zeros = type == 0
        ? prune(static_cast<const float*>(x), n, tau, seed, static_cast<float*>(out), threads)
        : prune(static_cast<const uint16_t*>(x), n, tau, seed, static_cast<uint16_t*>(out), threads);
}

}  // extern "C"
