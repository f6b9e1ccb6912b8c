// Batched transposition: between channels-first and channels-last, a matrix (rows, columns) for each image.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t EDGE = 8;    // rows and columns that are transposed in registers
constexpr int64_t STRIP = 64;  // columns whose cache lines stay in the first-level cache while all rows pass

typedef uint32_t Vector32 __attribute__((vector_size(4 * EDGE)));
typedef uint16_t Vector16 __attribute__((vector_size(2 * EDGE)));

template <class Vector>
void interleave(Vector& a, Vector& b) {
  const Vector low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  b = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  a = low;
}

// Three rounds of interleaving row i with row i + 4 transpose an 8x8 block.
template <class Vector, class Element>
void block(const Element* src, int64_t src_step, Element* dst, int64_t dst_step) {
  Vector row[EDGE], next[EDGE];
  for (int64_t i = 0; i < EDGE; ++i) std::memcpy(&row[i], src + i * src_step, sizeof(Vector));
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < EDGE / 2; ++i) {
      next[2 * i] = row[i];
      next[2 * i + 1] = row[i + EDGE / 2];
      interleave(next[2 * i], next[2 * i + 1]);
    }
    std::copy(next, next + EDGE, row);
  }
  for (int64_t i = 0; i < EDGE; ++i) std::memcpy(dst + i * dst_step, &row[i], sizeof(Vector));
}

template <class Vector, class Element>
void transpose(const Element* src, int64_t images, int64_t rows, int64_t columns, Element* dst, int threads) {
  const int64_t strips = (columns + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < images * strips; ++task) {
    const Element* from = src + task / strips * rows * columns;
    Element* to = dst + task / strips * rows * columns;
    const int64_t first = task % strips * STRIP, last = std::min(first + STRIP, columns);
    for (int64_t r = 0; r < rows; r += EDGE) {
      const int64_t stop = std::min(r + EDGE, rows);
      int64_t c = first;
      if (stop - r == EDGE)
        for (; c + EDGE <= last; c += EDGE) block<Vector>(from + r * columns + c, columns, to + c * rows + r, rows);
      for (; c < last; ++c)
        for (int64_t i = r; i < stop; ++i) to[c * rows + i] = from[i * columns + c];
    }
  }
}

}  // namespace

// dst[n][c][r] = src[n][r][c]; elements of four or two bytes.
extern "C" void eff_transpose(const void* src, int bytes, int64_t images, int64_t rows, int64_t columns, void* dst,
                              int threads) {
  if (bytes == 4)
    transpose<Vector32>(static_cast<const uint32_t*>(src), images, rows, columns, static_cast<uint32_t*>(dst), threads);
  else
    transpose<Vector16>(static_cast<const uint16_t*>(src), images, rows, columns, static_cast<uint16_t*>(dst), threads);
}
