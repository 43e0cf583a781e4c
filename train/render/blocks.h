/* Blocks of a JPEG: passed over, read, and turned into samples. */

#ifndef BLOCKS_H
#define BLOCKS_H

#include "codes.h"


/* Whether a block's codes came to its end, and no further. */
INLINE int complete(int k, int last) {
  return (k == 64 || k > END_OF_BLOCK) && last >= -LAST_LIMIT && last <= LAST_LIMIT;
}

/* Reads past a block but for its DC difference, which later blocks need; 0 for codes that are none. */
INLINE int pass_block(Reader *reader, const Table *dc, const Table *ac, int *last) {
  refill(reader);
  const Code first = take(dc, reader);
  if (first.forward == NO_CODE) return 0;
  *last += first.value;
  int k = 1;
  while (k < 64) {
    refill(reader);
    for (int nth = 0; nth < 2 && k < 64; nth++) {
      const Leap leap = ac->leap[reader->held >> (64 - LOOK)];
      const int after = k + (leap.forward & (ENDS - 1));
      if (leap.bits && after <= 64) {
        consume(reader, leap.bits);
        k = leap.forward & ENDS ? END_OF_BLOCK + 1 : after;
      } else {
        k += take(ac, reader).forward;
      }
    }
  }
  return complete(k, *last);
}

/* Reads a block's coefficients in rows; 0 for codes that are none. *plain: there is none but the first. */
INLINE int read_block(Reader *reader, const Table *dc, const Table *ac, int *last, int16_t *block, int *plain) {
  memset(block, 0, 64 * sizeof *block);
  refill(reader);
  Code code = take(dc, reader);
  if (code.forward == NO_CODE) return 0;
  *last += code.value;
  block[0] = (int16_t)within(*last, INT16_MIN, INT16_MAX);
  int k = 1;
  for (;;) {
    code = take(ac, reader);
    k += code.forward;
    if (k > 64) break;
    block[ZIGZAG[k - 1]] = code.value;
    if (k == 64) break;
    refill(reader);
    code = take(ac, reader);
    k += code.forward;
    if (k > 64) break;
    block[ZIGZAG[k - 1]] = code.value;
    if (k == 64) break;
  }
  *plain = k == END_OF_BLOCK + 1;
  return complete(k, *last);
}

typedef int32_t Lanes __attribute__((vector_size(32)));
typedef int16_t Words __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(8)));

INLINE void transform(Lanes *v, int shift) {
  const Lanes round = (Lanes){} + (1 << (shift - 1));
  Lanes z1 = (v[2] + v[6]) * 4433, even2 = z1 - v[6] * 15137, even3 = z1 + v[2] * 6270;
  const Lanes even0 = (v[0] + v[4]) << 13, even1 = (v[0] - v[4]) << 13;
  const Lanes a = even0 + even3 + round, b = even1 + even2 + round, c = even1 - even2 + round, d = even0 - even3 + round;
  const Lanes z5 = (v[7] + v[3] + v[5] + v[1]) * 9633;
  const Lanes z3 = z5 - (v[7] + v[3]) * 16069, z4 = z5 - (v[5] + v[1]) * 3196;
  z1 = (v[7] + v[1]) * -7373;
  const Lanes z2 = (v[5] + v[3]) * -20995;
  const Lanes odd0 = v[7] * 2446 + z1 + z3, odd1 = v[5] * 16819 + z2 + z4;
  const Lanes odd2 = v[3] * 25172 + z2 + z3, odd3 = v[1] * 12299 + z1 + z4;
  v[0] = (a + odd3) >> shift, v[7] = (a - odd3) >> shift;
  v[1] = (b + odd2) >> shift, v[6] = (b - odd2) >> shift;
  v[2] = (c + odd1) >> shift, v[5] = (c - odd1) >> shift;
  v[3] = (d + odd0) >> shift, v[4] = (d - odd0) >> shift;
}

#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
INLINE void transpose(Lanes *v) {
  Lanes s[8], t[8];
  for (int i = 0; i < 8; i += 2) {
    s[i] = MIX(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    s[i + 1] = MIX(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    t[i] = MIX(s[i], s[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    t[i + 1] = MIX(s[i], s[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    t[i + 2] = MIX(s[i + 1], s[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    t[i + 3] = MIX(s[i + 1], s[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = MIX(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = MIX(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#else
INLINE void transpose(Lanes *v) {
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < i; j++) {
      const int32_t held = v[i][j];
      v[i][j] = v[j][i], v[j][i] = held;
    }
}
#endif

/* Samples of a block's coefficients; 0 where these are more than samples make. */
INLINE int write_block(const int16_t *block, int plain, const int32_t *quantizer, uint8_t *out, int pitch) {
  if (plain) {
    const int value = block[0] * quantizer[0];
    if (value < -SUM_LIMIT || value > SUM_LIMIT) return 0;
    const int sample = within(((value * 4 + 16) >> 5) + 128, 0, 255);
    for (int row = 0; row < 8; row++) memset(out + (ptrdiff_t)row * pitch, sample, 8);
    return 1;
  }
  Lanes v[8], sums = {0};
  for (int row = 0; row < 8; row++) {
    Words words;
    Lanes factors;
    memcpy(&words, block + 8 * row, sizeof words);
    memcpy(&factors, quantizer + 8 * row, sizeof factors);
    v[row] = __builtin_convertvector(words, Lanes) * factors;
    sums += (v[row] ^ (v[row] >> 31)) - (v[row] >> 31);
  }
  int sum = 0;
  for (int column = 0; column < 8; column++) sum += sums[column];
  if (sum > SUM_LIMIT) return 0;
  transform(v, 11);
  transpose(v);
  transform(v, 18);
  transpose(v);
  for (int row = 0; row < 8; row++) {
    Lanes samples = v[row] + 128;
    samples &= ~(samples >> 31);
    samples = (samples & (samples < 256)) | ((samples > 255) & 255);
    const Bytes bytes = __builtin_convertvector(samples, Bytes);
    memcpy(out + (ptrdiff_t)row * pitch, &bytes, sizeof bytes);
  }
  return 1;
}

#endif
