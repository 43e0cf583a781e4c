/* A member: its header, and the samples of those of its blocks that a window shows. */

#ifndef MEMBER_H
#define MEMBER_H

#include "blocks.h"


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

#endif
