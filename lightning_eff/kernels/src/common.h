// What the kernels share: blocks of elements, the bits of floats, bfloat16 read as float32, and random bits.
//
// The random bits are those of lightning_eff/functional/random.py: a function of the seed and the element's position
// alone, so results do not depend on the number of threads.
//
// Element types: 0 = float32, 1 = bfloat16 (as uint16_t, the upper half of a float32).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using std::int64_t;

constexpr int64_t BLOCK = 2048;      // elements per block, and per row of the random stream
constexpr int64_t PARALLEL = 32768;  // fewer elements than this stay on one thread
constexpr int32_t MAGNITUDE = 0x7FFFFFFF, INFINITE = 0x7F800000, NOT_A_NUMBER = 0x7FC00000;  // bits of a float32

// ---------------------------------------------------------------------------------------------- the bits of a float

inline int32_t as_int(float x) { int32_t i; std::memcpy(&i, &x, 4); return i; }
inline uint32_t as_bits(float x) { uint32_t i; std::memcpy(&i, &x, 4); return i; }
inline float as_float(int32_t i) { float x; std::memcpy(&x, &i, 4); return x; }
inline float as_float(uint32_t i) { float x; std::memcpy(&x, &i, 4); return x; }

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }

// Element i as float32; and the bits of a float32 as element i: of bfloat16 the upper half, which has to be all of it.
template <class T>
inline float read(const T* x, int64_t i) { return widen(x[i]); }
inline void write(float* out, int64_t i, int32_t bits) { out[i] = as_float(bits); }
inline void write(uint16_t* out, int64_t i, int32_t bits) {
    out[i] = static_cast<uint16_t>(static_cast<uint32_t>(bits) >> 16);
}

// ------------------------------------------------------------------------------------------------------ random bits

inline uint32_t mix(uint32_t h) {  // lowbias32 (C. Wellons), a bijection with low avalanche bias
    h ^= h >> 16; h *= 0x7feb352du;
    h ^= h >> 15; h *= 0x846ca68bu;
    return h ^ (h >> 16);
}

inline uint32_t row_seed(uint64_t seed, int64_t row) {
    return mix(mix(static_cast<uint32_t>(row) ^ mix(static_cast<uint32_t>(seed))) + static_cast<uint32_t>(seed >> 32));
}

// 32 bits, or an integer below 2^23, for the element in a column of the row with this seed.
inline uint32_t random_bits(int64_t column, uint32_t row) {
    return mix(static_cast<uint32_t>(column) * 0x9E3779B9u + row);
}
inline int32_t random_23(int64_t column, uint32_t row) { return static_cast<int32_t>(random_bits(column, row) >> 9); }

}  // namespace
