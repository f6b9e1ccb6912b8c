// bfloat16 weights: stochastic rounding, Kahan compensation, split, join and a step of SGD, each in one pass.
//
// The rules and the random bits are those of lightning_eff/functional/numerics/bf16.py; a test holds both equal bit for bit.
// Blocks of BLOCK elements are the rows of the random stream, so results do not depend on the number of threads.

#include "common.h"

namespace {

constexpr uint32_t QUIET = 0x400000u, LARGEST = 0x7F7F0000u;

inline uint16_t nearest_number(float x) {  // of anything but NaN
    const uint32_t bits = as_bits(x);
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t nearest(float x) {
    return x != x ? static_cast<uint16_t>((as_bits(x) | QUIET) >> 16) : nearest_number(x);
}

template <class Body>
void blocks_of(int64_t n, int threads, Body body) {
    #pragma omp parallel for num_threads(threads) if (n >= PARALLEL)
    for (int64_t b = 0; b < (n + BLOCK - 1) / BLOCK; ++b) body(b, b * BLOCK, std::min(n, (b + 1) * BLOCK));
}

// -------------------------------------------------------------------------------------------------- one element

inline float join(uint16_t hi, uint16_t lo) {
    const uint32_t upper = static_cast<uint32_t>(hi) << 16;
    const uint32_t away = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(lo)));
    return as_float(upper + ((upper & MAGNITUDE) > INFINITE ? static_cast<uint32_t>(lo) : away));
}

inline void split(float x, uint16_t& hi, uint16_t& lo) {
    const uint32_t bits = as_bits(x);
    hi = static_cast<uint16_t>(((bits & MAGNITUDE) > INFINITE ? bits | QUIET : bits + 0x8000u) >> 16);
    lo = static_cast<uint16_t>(bits);  // the low half is the same whichever way hi was made
}

inline uint16_t stochastic(float x, uint32_t place, uint32_t start) {
    const uint32_t bits = as_bits(x), magnitude = bits & MAGNITUDE;
    const uint32_t noise = random_bits(place, start) >> 16;
    uint32_t rounded = bits + noise;
    rounded = (rounded & MAGNITUDE) >= INFINITE ? (bits & ~MAGNITUDE) | LARGEST : rounded;
    const uint32_t special = magnitude > INFINITE ? bits | QUIET : bits;
    return static_cast<uint16_t>((magnitude >= INFINITE ? special : rounded) >> 16);
}

inline void kahan(uint16_t& weight, uint16_t& compensation, float update) {
    const float old = widen(weight), d = update + widen(compensation);
    const uint16_t next = nearest(old + d);
    const float rest = d - (widen(next) - old);
    weight = next;
    compensation = (as_bits(rest) & MAGNITUDE) < INFINITE ? nearest_number(rest) : uint16_t(0);
}

inline float choose(uint32_t mask, float yes, float no) {
    return as_float((as_bits(yes) & mask) | (as_bits(no) & ~mask));
}

// torch.optim.SGD, operation by operation: torch's add with alpha is a fused multiply-add. Masks are all ones or zero.
struct SGD {
    float decay, momentum, undamped, rate;
    uint32_t decays, first, nesterov, minus;

    template <bool MOMENTUM>
    float operator()(float w, float g, float* buffer) const {
        g = as_float(as_bits(g) ^ minus);
        g = choose(decays, std::fma(w, decay, g), g);
        if (MOMENTUM) {
            const float b = choose(first, g, std::fma(g, undamped, *buffer * momentum));
            *buffer = b;
            g = choose(nesterov, std::fma(b, momentum, g), b);
        }
        return std::fma(g, rate, w);
    }
};

enum Update { SR = 0, KAHAN = 1, SPLIT = 2 };

template <int UPDATE, bool MOMENTUM>
void sgd_block(const SGD sgd, uint16_t* __restrict weight, uint16_t* __restrict kept, const uint16_t* __restrict grad,
               float* __restrict buffer, int64_t n, uint32_t start) {
    for (int64_t i = 0; i < n; ++i) {
        const float old = UPDATE == SPLIT ? join(weight[i], kept[i]) : widen(weight[i]);
        const float next = sgd.operator()<MOMENTUM>(old, widen(grad[i]), buffer + i);
        if (UPDATE == SR) weight[i] = stochastic(next, static_cast<uint32_t>(i), start);
        if (UPDATE == KAHAN) kahan(weight[i], kept[i], next - old);
        if (UPDATE == SPLIT) split(next, weight[i], kept[i]);
    }
}

}  // namespace

extern "C" {

// out = x rounded up or down with the probabilities that make its mean x.
void eff_bf16_stochastic(const float* x, int64_t n, uint64_t seed, uint16_t* out, int threads) {
    blocks_of(n, threads, [=](int64_t row, int64_t begin, int64_t end) {
        const uint32_t start = row_seed(seed, row);
        for (int64_t i = begin; i < end; ++i) out[i] = stochastic(x[i], static_cast<uint32_t>(i - begin), start);
    });
}

// d = update + c; w' = bf16(w + d); c' = bf16(d - (w' - w)), zero where it is not finite. In place.
// is_sum: x is not the update but the weight and the update.
void eff_bf16_kahan(uint16_t* weight, uint16_t* compensation, const float* x, int64_t n, int is_sum, int threads) {
    const uint32_t mask = is_sum ? ~0u : 0u;
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
            kahan(weight[i], compensation[i], choose(mask, x[i] - widen(weight[i]), x[i]));
    });
}

// hi is x rounded half away from zero, lo the 16 bits that are missing; NaN is cut.
void eff_bf16_split(const float* x, int64_t n, uint16_t* hi, uint16_t* lo, int threads) {
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) split(x[i], hi[i], lo[i]);
    });
}

void eff_bf16_join(const uint16_t* hi, const uint16_t* lo, int64_t n, float* out, int threads) {
    blocks_of(n, threads, [=](int64_t, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = join(hi[i], lo[i]);
    });
}

// One step of SGD and the write-back: only the bfloat16 weight, what is kept beside it, the gradient and the momentum
// pass through memory. kept, buffer: null where there is none.
void eff_bf16_sgd(uint16_t* weight, uint16_t* kept, const uint16_t* grad, float* buffer, int64_t n, int update,
                  uint64_t seed, float decay, float momentum, float undamped, float rate, int first, int nesterov,
                  int maximize, int threads) {
    const SGD sgd{decay, momentum, undamped, rate, decay != 0 ? ~0u : 0u, first ? ~0u : 0u, nesterov ? ~0u : 0u,
                  maximize ? ~MAGNITUDE : 0u};
    const auto run = update == SR      ? (buffer ? sgd_block<SR, true> : sgd_block<SR, false>)
                     : update == KAHAN ? (buffer ? sgd_block<KAHAN, true> : sgd_block<KAHAN, false>)
                                       : (buffer ? sgd_block<SPLIT, true> : sgd_block<SPLIT, false>);
    blocks_of(n, threads, [=](int64_t row, int64_t begin, int64_t end) {
        uint16_t* const beside = kept ? kept + begin : nullptr;
        float* const moving = buffer ? buffer + begin : nullptr;
        run(sgd, weight + begin, beside, grad + begin, moving, end - begin, row_seed(seed, row));
    });
}

}  // extern "C"
