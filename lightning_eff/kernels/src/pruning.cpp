// Unbiased stochastic pruning in one pass, for the CPU. Every decision is that of lightning_eff/functional/numerics/lognormal.py
// (same hash of the element's position, same comparisons): a test holds both equal bit for bit.
//
// Element types: 0 = float32, 1 = bfloat16.

#include "common.h"

namespace {

template <class T>
int64_t prune(const T* x, int64_t n, float tau, uint64_t seed, T* out, int threads) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    const uint32_t tau_bits = as_bits(tau);
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
            const uint32_t bits = as_bits(read(p, j)), sign = bits & 0x80000000u;
            const float magnitude = as_float(bits & MAGNITUDE);
            const float u = static_cast<float>(random_23(j, row)) * 1.1920928955078125e-7f;
            // Masks instead of branches. NaN is not below tau and stays.
            const uint32_t below = -static_cast<uint32_t>(magnitude < tau);
            const uint32_t kept = -static_cast<uint32_t>(u * tau < magnitude);
            const uint32_t result = (bits & ~below) | (below & kept & (tau_bits | sign));
            empty += (result & MAGNITUDE) == 0;
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
