/* What the parts of render.c share, and reading a JPEG's Huffman codes. */

#ifndef CODES_H
#define CODES_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

/* One build serves every x86-64: when it is loaded, the version that the processor can run is taken. */
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_PROCESSORS __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_PROCESSORS
#endif
#define INLINE static inline __attribute__((always_inline))

enum { DONE, UNDONE };
enum { RESIZE, WARP };
enum {
  LOOK = 11,           /* bits that a table tells about at once */
  UNFINISHED = 64,     /* flag in Code.bits: the value is still to be taken, .value bits of it; 0: no code so short */
  END_OF_BLOCK = 255,  /* Code.forward: beyond what any other codes can make of it */
  NO_CODE = 127,       /* Code.forward where the bits are no code */
  ENDS = 128,          /* flag in Leap.forward: the last of its codes ends the block */
  PAD = 2048,          /* zeros behind the codes: more than one MCU can take */
  SUM_LIMIT = 5800,    /* of a block's coefficients: below, no transform in 16-bit lanes overflows */
  LAST_LIMIT = 1 << 20 /* of a sum of DC differences: above is nonsense */
};

/* A crop and its place, in the order of native.py's FIELDS. */
typedef struct {
  int64_t data, size, stored_width, stored_height, x, y, width, height;
  int64_t scaled_x, scaled_y, flip, from_x, from_y, out, pitch, columns, rows, kernel;
} Job;

typedef struct {
  int16_t value;
  uint8_t bits, forward;
} Code;

/* As many codes as begin within LOOK bits; no bits where the first is longer. */
typedef struct {
  uint8_t bits, forward;
} Leap;

typedef struct {
  uint8_t raw[16 + 256]; /* as in the file: counts by length, symbols */
  int made;
  int32_t highest[17], offset[17];
  Code look[1 << LOOK];
  Leap leap[1 << LOOK];
} Table;

typedef struct {
  int identity, across, down, quantizer, dc, ac, last;
  int left, top, pitch; /* of the plane: its first sample in the component, bytes a row */
  uint8_t *plane;
} Component;

typedef struct {
  Table tables[2][4];
  int32_t quantizers[4][64]; /* in rows */
  Component components[3];
  uint8_t *codes, *work;
  size_t codes_room, work_room;
} Context;

typedef struct {
  uint64_t held;
  const uint8_t *next;
  int bits;
} Reader;

typedef struct {
  int left, top, right, bottom;
} Box;

/* With places for what nonsense may write behind a block's end. */
static const uint8_t ZIGZAG[64 + 16] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                   12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                   35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                   58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

INLINE int least(int a, int b) { return a < b ? a : b; }
INLINE int most(int a, int b) { return a > b ? a : b; }
INLINE int within(int value, int low, int high) { return least(most(value, low), high); }

static int make_room(uint8_t **buffer, size_t *room, size_t needed) {
  if (*room < needed) {
    uint8_t *larger = realloc(*buffer, 2 * needed);
    if (!larger) return 0;
    *buffer = larger;
    *room = 2 * needed;
  }
  return 1;
}


INLINE int extended(int raw, int size) { return raw < 1 << (size - 1) ? raw - (1 << size) + 1 : raw; }

INLINE int forward_of(int symbol) { return symbol & 15 ? (symbol >> 4) + 1 : symbol >> 4 ? 16 : END_OF_BLOCK; }

/* Makes the table of table->raw: 0 where 8-bit samples need no such table. */
static int make_table(Table *table, int is_dc) {
  const uint8_t *symbols = table->raw + 16;
  uint8_t lengths[1 << LOOK] = {0};
  int code = 0, nth = 0;
  for (int at = 0; at < 1 << LOOK; at++) table->look[at] = (Code){0, UNFINISHED, 0};
  for (int bits = 1; bits <= 16; bits++, code <<= 1) {
    table->offset[bits] = nth - code;
    for (int i = 0; i < table->raw[bits - 1]; i++, nth++, code++) {
      const int symbol = symbols[nth], size = symbol & 15;
      if (code >= 1 << bits || (is_dc ? symbol > 11 : size > 10 || (!size && symbol && symbol != 0xF0))) return 0;
      for (int rest = 0; bits <= LOOK && rest < 1 << (LOOK - bits); rest++) {
        const int at = code << (LOOK - bits) | rest, left = LOOK - bits - size, whole = left >= 0;
        const int value = !size ? 0 : whole ? extended(rest >> left, size) : size;
        table->look[at] = (Code){(int16_t)value, (uint8_t)((bits + size) | (whole ? 0 : UNFINISHED)),
                                 (uint8_t)forward_of(symbol)};
        lengths[at] = (uint8_t)bits;
      }
    }
    table->highest[bits] = table->raw[bits - 1] ? code - 1 : -1;
  }
  for (int at = 0; !is_dc && at < 1 << LOOK; at++) {
    int bits = 0, forward = 0;
    while (bits < LOOK && forward < 64) {
      const int rest = (at << bits) & ((1 << LOOK) - 1), length = lengths[rest], way = table->look[rest].forward;
      if (!length || bits + length > LOOK) break;
      bits += table->look[rest].bits & (UNFINISHED - 1);
      forward += way == END_OF_BLOCK ? 1 + ENDS : way;
    }
    table->leap[at] = (Leap){(uint8_t)bits, (uint8_t)forward};
  }
  return 1;
}

INLINE void refill(Reader *reader) {
  uint64_t more;
  memcpy(&more, reader->next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  more = __builtin_bswap64(more);
#endif
  reader->held |= more >> reader->bits;
  reader->next += (63 - reader->bits) >> 3;
  reader->bits |= 56;
}

static Code long_code(const Table *table, uint64_t held) {
  for (int bits = LOOK + 1; bits <= 16; bits++) {
    const int code = (int)(held >> (64 - bits));
    if (code > table->highest[bits]) continue;
    const int symbol = table->raw[16 + ((table->offset[bits] + code) & 255)], size = symbol & 15;
    const int value = size ? extended((int)(held << bits >> (64 - size)), size) : 0;
    return (Code){(int16_t)value, (uint8_t)(bits + size), (uint8_t)forward_of(symbol)};
  }
  return (Code){0, 0, NO_CODE};
}

INLINE void consume(Reader *reader, int bits) {
  reader->held <<= bits;
  reader->bits -= bits;
}

/* Takes the next code and its value: at most 27 bits, of the 56 that refill gives. */
INLINE Code take(const Table *table, Reader *reader) {
  Code code = table->look[reader->held >> (64 - LOOK)];
  if (__builtin_expect(code.bits & UNFINISHED, 0)) {
    const int size = code.value;
    code.bits -= UNFINISHED;
    if (size) code.value = (int16_t)extended((int)(reader->held << (code.bits - size) >> (64 - size)), size);
    else code = long_code(table, reader->held);
  }
  consume(reader, code.bits);
  return code;
}

#endif
