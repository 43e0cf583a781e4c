/* Crops from their JPEGs straight into their regions of a jigsaw: what native.py calls.
 *
 * A member is read whole (a code that is damaged anywhere must be noticed), but samples are computed only for the blocks
 * that the window shows, then turned to RGB, resampled and mirrored a row at a time into the jigsaw. The numbers are
 * those of libjpeg-turbo (accurate integer transform, smooth upsampling) and of OpenCV's resize and warpAffine for 8-bit
 * pixels: the tests hold this file to both, bit for bit. Whatever is not a plain baseline JPEG of three components
 * (4:4:4 or 4:2:0), and whatever is odd about one, is UNDONE: the caller does it the slow way and judges the damage.
 */

#include "member.h"

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
