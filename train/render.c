/* Crops from their JPEGs straight into their regions of a jigsaw: what native.py calls.
 *
 * A member is read whole (a code that is damaged anywhere must be noticed), but samples are computed only for the blocks
 * that the window shows, then turned to RGB, resampled and mirrored a row at a time into the jigsaw. The numbers are
 * those of libjpeg-turbo (accurate integer transform, smooth upsampling) and of OpenCV's resize and warpAffine for 8-bit
 * pixels: the tests hold this file to both, bit for bit. Whatever is not a plain baseline JPEG of three components
 * (4:4:4 or 4:2:0), and whatever is odd about one, is UNDONE: the caller does it the slow way and judges the damage.
 */

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

/* --- Huffman codes --- */

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

/* --- One block --- */

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

/* --- A member --- */

INLINE int word_at(const uint8_t *data) { return data[0] << 8 | data[1]; }

static int read_quantizers(Context *context, const uint8_t *data, int length, int *defined) {
  for (; length >= 65; data += 65, length -= 65) {
    if (data[0] > 3) return 0;
    for (int k = 0; k < 64; k++) context->quantizers[data[0]][ZIGZAG[k]] = data[1 + k];
    *defined |= 1 << data[0];
  }
  return !length;
}

static int read_tables(Context *context, const uint8_t *data, int length, int *defined) {
  while (length >= 17) {
    const int kind = data[0] >> 4, nth = data[0] & 15;
    uint8_t raw[16 + 256] = {0};
    int count = 0;
    for (int i = 0; i < 16; i++) count += data[1 + i];
    if (kind > 1 || nth > 3 || count > 256 || 17 + count > length) return 0;
    memcpy(raw, data + 1, 16 + (size_t)count);
    Table *table = &context->tables[kind][nth];
    if (!table->made || memcmp(table->raw, raw, sizeof raw)) {
      memcpy(table->raw, raw, sizeof raw);
      table->made = make_table(table, !kind);
    }
    if (!table->made) return 0;
    *defined |= 1 << (4 * kind + nth);
    data += 17 + count, length -= 17 + count;
  }
  return !length;
}

/* Reads all before the codes: where these begin, NULL for whatever is not plain. */
static const uint8_t *read_header(Context *context, const Job *job) {
  const uint8_t *data = (const uint8_t *)(intptr_t)job->data, *end = data + job->size;
  int quantizers = 0, tables = 0, frame = 0;
  if (job->size < 4 || data[0] != 0xFF || data[1] != 0xD8) return NULL;
  for (data += 2; end - data >= 4 && data[0] == 0xFF;) {
    const int marker = data[1], length = word_at(data + 2) - 2;
    data += 4;
    if (length < 0 || end - data < length) return NULL;
    if (marker == 0xE0) {
      /* A JFIF header of another version is worth a warning to libjpeg, which counts as damage. */
      if (length >= 6 && !memcmp(data, "JFIF", 5) && data[5] != 1) return NULL;
    } else if (marker == 0xDB) {
      if (!read_quantizers(context, data, length, &quantizers)) return NULL;
    } else if (marker == 0xC4) {
      if (!read_tables(context, data, length, &tables)) return NULL;
    } else if (marker == 0xC0) {
      if (frame || length != 15 || data[0] != 8 || data[5] != 3) return NULL;
      if (word_at(data + 1) != job->stored_height || word_at(data + 3) != job->stored_width) return NULL;
      for (int i = 0; i < 3; i++) {
        const uint8_t *of = data + 6 + 3 * i;
        Component *component = &context->components[i];
        *component = (Component){.identity = of[0], .across = of[1] >> 4, .down = of[1] & 15, .quantizer = of[2]};
        if (of[0] != i + 1 || of[2] > 3 || component->across != component->down) return NULL;
        if (component->across < 1 || component->across > (i ? 1 : 2)) return NULL;
      }
      frame = 1;
    } else if (marker == 0xDA) {
      if (!frame || length != 10 || data[0] != 3 || data[7] || data[8] != 63 || data[9]) return NULL;
      for (int i = 0; i < 3; i++) {
        Component *component = &context->components[i];
        component->dc = data[2 + 2 * i] >> 4, component->ac = data[2 + 2 * i] & 15;
        if (data[1 + 2 * i] != component->identity || component->dc > 3 || component->ac > 3) return NULL;
        if (!(quantizers >> component->quantizer & tables >> component->dc & tables >> (4 + component->ac) & 1))
          return NULL;
      }
      return data + length;
    } else if (marker != 0xE1 && marker != 0xFE) {
      return NULL;
    }
    data += length;
  }
  return NULL;
}

/* Copies the codes up to the end of the image without the zeros behind 0xFF: how many bytes, -1 for another marker. */
static ptrdiff_t gather_codes(Context *context, const uint8_t *data, const uint8_t *end) {
  if (!make_room(&context->codes, &context->codes_room, (size_t)(end - data) + PAD)) return -1;
  uint8_t *out = context->codes;
  for (;;) {
    const uint8_t *mark = memchr(data, 0xFF, (size_t)(end - data));
    if (!mark || end - mark < 2 || (mark[1] != 0x00 && mark[1] != 0xD9)) return -1;
    memcpy(out, data, (size_t)(mark - data));
    out += mark - data;
    data = mark + 2;
    if (mark[1]) break;
    *out++ = 0xFF;
  }
  memset(out, 0, PAD);
  return out - context->codes;
}

/* Gives each component the plane that holds the blocks of ``mcus``; the room after them, for ``more`` bytes, or NULL. */
static uint8_t *lay_planes(Context *context, Box mcus, size_t more) {
  size_t total = 0, size[3];
  for (int i = 0; i < 3; i++) {
    Component *component = &context->components[i];
    component->pitch = 8 * component->across * (mcus.right - mcus.left);
    component->left = 8 * component->across * mcus.left, component->top = 8 * component->down * mcus.top;
    size[i] = (size_t)component->pitch * 8 * (size_t)component->down * (size_t)(mcus.bottom - mcus.top);
    total += size[i];
  }
  if (!make_room(&context->work, &context->work_room, total + more)) return NULL;
  uint8_t *free_room = context->work;
  for (int i = 0; i < 3; free_room += size[i++]) context->components[i].plane = free_room;
  return free_room;
}

/* Reads all codes and fills the planes; 0 where anything about them is odd. */
INLINE int read_codes(Context *context, ptrdiff_t length, int across, int down, Box mcus) {
  Reader reader = {0, context->codes, 0};
  int16_t block[64];
  for (int row = 0; row < down; row++) {
    for (int column = 0; column < across; column++) {
      const int shown = row >= mcus.top && row < mcus.bottom && column >= mcus.left && column < mcus.right;
      for (int i = 0; i < 3; i++) {
        Component *component = &context->components[i];
        const Table *dc = &context->tables[0][component->dc], *ac = &context->tables[1][component->ac];
        for (int nth = 0; nth < component->across * component->down; nth++) {
          if (!shown) {
            if (!pass_block(&reader, dc, ac, &component->last)) return 0;
            continue;
          }
          int plain;
          if (!read_block(&reader, dc, ac, &component->last, block, &plain)) return 0;
          const int x = 8 * (column * component->across + nth % component->across) - component->left;
          const int y = 8 * (row * component->down + nth / component->across) - component->top;
          uint8_t *out = component->plane + (ptrdiff_t)y * component->pitch + x;
          if (!write_block(block, plain, context->quantizers[component->quantizer], out, component->pitch)) return 0;
        }
      }
      if (reader.next - context->codes > length + 8) return 0;
    }
  }
  const ptrdiff_t left = 8 * (length - (reader.next - context->codes)) + reader.bits;
  return left >= 0 && left < 8;
}

/* --- Rows --- */

/* A row of a component that has a sample for two pixels each way: smooth, as libjpeg's h2v2 upsampling. */
INLINE void upsample(const Component *component, int row, int width, int height, int left, int count, uint8_t *out) {
  const int last_row = (height + 1) / 2 - 1, last = (width + 1) / 2 - 1, middle = row >> 1;
  const int beside = within(row & 1 ? middle + 1 : middle - 1, 0, last_row);
  const uint8_t *near = component->plane + (ptrdiff_t)(middle - component->top) * component->pitch - component->left;
  const uint8_t *far = component->plane + (ptrdiff_t)(beside - component->top) * component->pitch - component->left;
  for (int i = 0; i < count; i++) {
    const int x = left + i, at = x >> 1, next = within(x & 1 ? at + 1 : at - 1, 0, last);
    out[i] = (uint8_t)((3 * (3 * near[at] + far[at]) + 3 * near[next] + far[next] + 8 - (x & 1)) >> 4);
  }
}

INLINE void to_rgb(const uint8_t *restrict y, const uint8_t *restrict cb, const uint8_t *restrict cr, int count,
                   uint8_t *restrict out) {
  for (int i = 0; i < count; i++) {
    const int light = y[i], blue = cb[i] - 128, red = cr[i] - 128;
    out[4 * i] = (uint8_t)within(light + ((91881 * red + 32768) >> 16), 0, 255);
    out[4 * i + 1] = (uint8_t)within(light + ((32768 - 22554 * blue - 46802 * red) >> 16), 0, 255);
    out[4 * i + 2] = (uint8_t)within(light + ((116130 * blue + 32768) >> 16), 0, 255);
    out[4 * i + 3] = 0;
  }
}

/* One axis of the window: of each of ``count`` pixels the first source sample of two, and both weights. */
typedef struct {
  int *at, *first, *second;
} Axis;

/* As cv2.resize: weights of 1/2048 by single-precision places. Columns keep inside, rows repeat the border's. */
static void resize_axis(Axis axis, int count, int from, int step, int scaled, int size, int inside) {
  const double scale = 1.0 / ((double)scaled / size);
  for (int i = 0; i < count; i++) {
    float place = (float)((from + i * step + 0.5) * scale - 0.5);
    int at = (int)floorf(place);
    place -= (float)at;
    if (inside && at < 0) at = 0, place = 0;
    if (inside && at >= size - 1) at = size - 1, place = 0;
    axis.at[i] = at;
    axis.first[i] = (int)lrintf((1.0f - place) * 2048), axis.second[i] = (int)lrintf(place * 2048);
  }
}

/* As cv2.warpAffine: places in steps of 1/32, rounded twice; ``moving`` tells which of its roundings an axis meets. */
static void warp_axis(Axis axis, int count, int from, int flip, int scaled, int size, int moving) {
  const double step = (double)size / scaled, first = flip ? scaled - from - 0.5 : from + 0.5;
  const double slope = flip ? -step : step, start = first * step - 0.5;
  for (int i = 0; i < count; i++) {
    const long place = moving ? lrint(slope * i * 1024) + lrint(start * 1024) : lrint((slope * i + start) * 1024);
    const int fine = (int)((place + 16) >> 5), at = fine >> 5, part = fine & 31, outside = at < 0 || at >= size - 1;
    axis.at[i] = within(at, 0, size - 1);
    axis.first[i] = outside ? 32 : 32 - part, axis.second[i] = outside ? 0 : part;
  }
}

typedef int32_t Pixel __attribute__((vector_size(16)));
typedef int16_t PixelWords __attribute__((vector_size(8)));
typedef uint8_t PixelBytes __attribute__((vector_size(4)));

/* From a row of four bytes a pixel to the window's columns, three words a pixel and one more behind the last. */
INLINE void across_row(const uint8_t *row, Axis axis, int first, int count, int shift, int16_t *out) {
  for (int i = 0; i < count; i++) {
    PixelBytes left, right;
    memcpy(&left, row + 4 * (ptrdiff_t)(axis.at[i] - first), 4);
    memcpy(&right, row + 4 * (ptrdiff_t)(axis.at[i] - first) + 4, 4);
    const Pixel sum = __builtin_convertvector(left, Pixel) * axis.first[i] +
                      __builtin_convertvector(right, Pixel) * axis.second[i];
    const PixelWords words = __builtin_convertvector(sum >> shift, PixelWords);
    memcpy(out + 3 * i, &words, sizeof words);
  }
}

INLINE void between_rows(const int16_t *restrict upper, const int16_t *restrict lower, int first, int second, int count,
                         int kernel, uint8_t *restrict out) {
  if (kernel == RESIZE)
    for (int i = 0; i < count; i++) {
      const int value = (((upper[i] * first) >> 16) + ((lower[i] * second) >> 16) + 2) >> 2;
      out[i] = (uint8_t)(value > 255 ? 255 : value);
    }
  else
    for (int i = 0; i < count; i++) out[i] = (uint8_t)((upper[i] * first + lower[i] * second + 512) >> 10);
}

/* One crop: decoded as far as its window shows it, resampled, mirrored and written. */
INLINE int render_one(Context *context, const Job *job) {
  const int width = (int)job->width, height = (int)job->height, columns = (int)job->columns, rows = (int)job->rows;
  const int scaled_x = (int)job->scaled_x, scaled_y = (int)job->scaled_y, flip = (int)job->flip;
  const int stored_width = (int)job->stored_width, stored_height = (int)job->stored_height;
  if (job->x < 0 || job->y < 0 || width < 1 || height < 1 || columns < 1 || rows < 1) return UNDONE;
  if (job->x + width > stored_width || job->y + height > stored_height) return UNDONE;
  const uint8_t *codes = read_header(context, job);
  if (!codes) return UNDONE;
  const ptrdiff_t length = gather_codes(context, codes, (const uint8_t *)(intptr_t)job->data + job->size);
  const int halved = context->components[0].across == 2, mcu = halved ? 16 : 8;
  /* So few columns libjpeg upsamples in another way. */
  if (length < 0 || (halved && (stored_width + 1) / 2 <= 2)) return UNDONE;

  const size_t sides = (size_t)(columns + rows);
  int *places = malloc(3 * sides * sizeof(int));
  if (!places) return UNDONE;
  const Axis x = {places, places + sides, places + 2 * sides};
  const Axis y = {x.at + columns, x.first + columns, x.second + columns};
  if (job->kernel == WARP) {
    warp_axis(x, columns, (int)job->from_x, flip, scaled_x, width, 1);
    warp_axis(y, rows, (int)job->from_y, 0, scaled_y, height, 0);
  } else {
    const int from = (int)job->from_x;
    resize_axis(x, columns, flip ? scaled_x - 1 - from : from, flip ? -1 : 1, scaled_x, width, 1);
    resize_axis(y, rows, (int)job->from_y, 1, scaled_y, height, 0);
  }
  /* What is seen of the member, and two pixels more: upsampling looks at its neighbours. */
  const int beyond = halved ? 2 : 0, left = (int)job->x + least(x.at[0], x.at[columns - 1]);
  const int right = (int)job->x + least(most(x.at[0], x.at[columns - 1]) + 1, width - 1);
  const int top = (int)job->y + within(y.at[0], 0, height - 1);
  const int bottom = (int)job->y + within(y.at[rows - 1] + 1, 0, height - 1);
  const Box mcus = {most(left - beyond, 0) / mcu, most(top - beyond, 0) / mcu,
                    least(right + beyond, stored_width - 1) / mcu + 1, least(bottom + beyond, stored_height - 1) / mcu + 1};
  const int seen = right - left + 1;
  /* Behind the planes: two rows of the window's columns, one of the member's, a pixel longer, and two of its chroma. */
  const size_t line_room = 3 * (size_t)columns + 16;
  uint8_t *room = lay_planes(context, mcus, 64 + 2 * line_room * sizeof(int16_t) + 6 * ((size_t)seen + 1));
  if (!room || !read_codes(context, length, (stored_width + mcu - 1) / mcu, (stored_height + mcu - 1) / mcu, mcus)) {
    free(places);
    return UNDONE;
  }
  room += -(uintptr_t)room & 63;
  int16_t *lines[2] = {(int16_t *)room, (int16_t *)room + line_room};
  uint8_t *rgb = (uint8_t *)(lines[1] + line_room), *blue = rgb + 4 * (seen + 1), *red = blue + seen;
  memset(rgb + 4 * seen, 0, 4);
  int held[2] = {-1, -1};
  for (int row = 0; row < rows; row++) {
    int wanted[2];
    for (int i = 0; i < 2; i++) {
      const int inside = wanted[i] = within(y.at[row] + i, 0, height - 1), line = (int)job->y + inside;
      if (held[inside & 1] == inside) continue;
      const uint8_t *planes[3];
      for (int nth = 0; nth < 3; nth++) {
        const Component *component = &context->components[nth];
        planes[nth] = component->plane + (ptrdiff_t)(line - component->top) * component->pitch + left - component->left;
      }
      if (halved) {
        upsample(&context->components[1], line, stored_width, stored_height, left, seen, blue);
        upsample(&context->components[2], line, stored_width, stored_height, left, seen, red);
        planes[1] = blue, planes[2] = red;
      }
      to_rgb(planes[0], planes[1], planes[2], seen, rgb);
      across_row(rgb, x, left - (int)job->x, columns, job->kernel == RESIZE ? 4 : 0, lines[inside & 1]);
      held[inside & 1] = inside;
    }
    between_rows(lines[wanted[0] & 1], lines[wanted[1] & 1], y.first[row], y.second[row], 3 * columns, (int)job->kernel,
                 (uint8_t *)(intptr_t)job->out + (ptrdiff_t)row * job->pitch);
  }
  free(places);
  return DONE;
}

/* --- What native.py calls --- */

API void *new_context(void) { return calloc(1, sizeof(Context)); }

API void free_context(Context *context) {
  if (!context) return;
  free(context->codes);
  free(context->work);
  free(context);
}

/* Renders jobs; of each, outcome tells DONE or UNDONE: then nothing was written. */
API FOR_PROCESSORS void render(Context *context, const Job *jobs, int64_t count, uint8_t *outcome) {
  for (int64_t i = 0; i < count; i++) outcome[i] = (uint8_t)render_one(context, &jobs[i]);
}
