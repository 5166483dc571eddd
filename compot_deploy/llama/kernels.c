/* See kernels.h. This file: checks, rounding, tiling, the portable kernels, and the choice at run time. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { STRIP = 64, MOST_OUT = 4 * COMPOT_TILE }; /* columns summed at a time; results of one call into a kernel */

typedef void (*round_function)(const float *part, int8_t *q, float *scale, int32_t *sums);
/* 1 to 4 tokens times the 16 rows of a tile. */
typedef void (*product_function)(const compot_tiles *t, const uint8_t *tile, const compot_activation *x, int tokens,
                                 float *out);

typedef struct {
    round_function round;
    product_function product;
} kernel_set;

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u, bits;
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f;
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000u | (mantissa << 13);
    } else {
        bits = sign | ((exponent + 112u) << 23) | (mantissa << 13);
    }
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static float load_half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return half_to_float(h);
}

static float load_bfloat(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    uint32_t bits = (uint32_t)h << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static int slots_of(const compot_leaf *leaf) { return leaf->of == 1 ? 64 : 32; }

static int64_t value_bytes(const compot_leaf *leaf) { return (int64_t)slots_of(leaf) * leaf->bits / 8; }

static int64_t record_bytes(const compot_leaf *leaf) {
    int position_bits = leaf->of == 1 ? 0 : leaf->of == 4 ? 2 : 3;
    return (int64_t)slots_of(leaf) * (leaf->bits + position_bits) / 8;
}

static int64_t groups_of(const compot_leaf *leaf) { return (leaf->inputs + leaf->group - 1) / leaf->group; }


/* One plane of slots: bits 1, 2 or 4 per slot, slot j * (slots * bits / 8) + i in byte i at bit j * bits. */
static void unpack_plane(const uint8_t *plane, int slots, int bits, uint8_t *out) {
    int bytes = slots * bits / 8, mask = (1 << bits) - 1;
    for (int j = 0; j < 8 / bits; j++)
        for (int i = 0; i < bytes; i++) out[j * bytes + i] = (uint8_t)((plane[i] >> (j * bits)) & mask);
}

/* The width of the integers of a leaf; what is stored is larger by half of their range. */
static int bits_of(const compot_leaf *leaf) {
    return leaf->kind == COMPOT_Q4_0 ? 4 : leaf->kind == COMPOT_Q8_0 ? 8 : leaf->bits;
}

/* The slots of 64 inputs of a row: unsigned, offset included, and for sparse ones where they belong in their group. */
static void read_unit(const compot_leaf *leaf, const uint8_t *row, int64_t u, uint8_t slots[64], uint8_t places[32]) {
    if (leaf->kind != COMPOT_PLANES) {
        int64_t blocks = (leaf->inputs + 31) / 32;
        for (int h = 0; h < 2; h++) {
            if (2 * u + h >= blocks) {
                memset(slots + 32 * h, leaf->kind == COMPOT_Q4_0 ? 8 : 128, 32);
            } else if (leaf->kind == COMPOT_Q4_0) {
                unpack_plane(row + 18 * (2 * u + h) + 2, 32, 4, slots + 32 * h);
            } else {
                const uint8_t *block = row + 34 * (2 * u + h) + 2;
                for (int i = 0; i < 32; i++) slots[32 * h + i] = block[i] ^ 0x80;
            }
        }
        return;
    }
    const uint8_t *record = row + 2 * groups_of(leaf) + u * record_bytes(leaf), *planes = record + value_bytes(leaf);
    int count = slots_of(leaf);
    uint8_t high[64];
    if (leaf->bits == 8) {
        for (int s = 0; s < count; s++) slots[s] = record[s] ^ 0x80;
    } else if (leaf->bits == 3) {
        unpack_plane(record, count, 2, slots);
        unpack_plane(record + count / 4, count, 1, high);
        for (int s = 0; s < count; s++) slots[s] |= (uint8_t)(high[s] << 2);
    } else {
        unpack_plane(record, count, leaf->bits, slots);
    }
    if (leaf->of == 1) return;
    unpack_plane(planes, 32, 2, places);
    if (leaf->of == 8) {
        unpack_plane(planes + 8, 32, 1, high);
        for (int s = 0; s < 32; s++) places[s] |= (uint8_t)(high[s] << 2);
    }
}

/* Where the scale of half h of a row is; NULL beyond the blocks. */
static const uint8_t *scale_at(const compot_leaf *leaf, const uint8_t *row, int64_t h) {
    if (leaf->kind == COMPOT_PLANES) {
        int64_t g = h * 32 / leaf->group, last = groups_of(leaf) - 1;
        return row + 2 * (g < last ? g : last);
    }
    return h < (leaf->inputs + 31) / 32 ? row + h * (leaf->kind == COMPOT_Q4_0 ? 18 : 34) : NULL;
}

static float float_value(const compot_leaf *leaf, const uint8_t *row, int64_t i) {
    float w;
    if (leaf->kind != COMPOT_F32) return leaf->kind == COMPOT_F16 ? load_half(row + 2 * i) : load_bfloat(row + 2 * i);
    memcpy(&w, row + 4 * i, 4);
    return w;
}

/* --- tiles --- */

int64_t compot_tiles_of(const compot_leaf *leaf, compot_tiles *tiles) {
    if (leaf->kind != COMPOT_Q4_0 && leaf->kind != COMPOT_Q8_0 && leaf->kind != COMPOT_PLANES) return 0;
    int planes = leaf->kind == COMPOT_PLANES;
    tiles->bits = bits_of(leaf), tiles->of = planes ? leaf->of : 1;
    tiles->fine = !planes || (leaf->group % 64 && leaf->group < leaf->inputs);
    tiles->units = compot_units(leaf->inputs), tiles->outputs = leaf->outputs;
    tiles->per_scale = tiles->fine ? 0 : leaf->group < leaf->inputs ? leaf->group / 64 : (int32_t)tiles->units;
    int64_t scales = tiles->fine ? 2 * tiles->units : (tiles->units + tiles->per_scale - 1) / tiles->per_scale;
    int slots = tiles->of == 1 ? 64 : 32, position_bits = tiles->of == 1 ? 0 : tiles->of == 4 ? 2 : 3;
    tiles->unit_bytes = COMPOT_TILE * slots * (tiles->bits + position_bits) / 8;
    tiles->head = (2 * COMPOT_TILE * scales + 63) & ~(int64_t)63;
    tiles->tile_bytes = tiles->head + tiles->units * tiles->unit_bytes;
    tiles->data = NULL;
    return tiles->tile_bytes * ((leaf->outputs + COMPOT_TILE - 1) / COMPOT_TILE);
}

/* Bits [from, from + bits) of the slots of 16 rows as a plane: vector j is 4 slots of each row, in order. */
static void put_plane(const uint8_t slots[COMPOT_TILE][64], int vectors, int from, int bits, uint8_t *plane) {
    int per = 8 / bits;
    uint32_t mask = ((1u << bits) - 1) * 0x01010101u, words[16 * COMPOT_TILE] = {0};
    for (int j = 0; j < vectors; j++)
        for (int r = 0; r < COMPOT_TILE; r++) {
            uint32_t word;
            memcpy(&word, slots[r] + 4 * j, 4);
            words[j / per * COMPOT_TILE + r] |= ((word >> from) & mask) << (j % per * bits);
        }
    memcpy(plane, words, (size_t)(vectors * COMPOT_TILE * bits / 2));
}

void compot_tile(const compot_leaf *leaf, compot_tiles *tiles, uint8_t *out) {
    int vectors = tiles->of == 1 ? 16 : 8, bits = tiles->bits;
    int64_t scales = tiles->fine ? 2 * tiles->units : (tiles->units + tiles->per_scale - 1) / tiles->per_scale;
    tiles->data = out;
    for (int64_t first = 0; first < leaf->outputs; first += COMPOT_TILE, out += tiles->tile_bytes) {
        const uint8_t *row = leaf->data + first * leaf->row_bytes;
        int rows = leaf->outputs - first < COMPOT_TILE ? (int)(leaf->outputs - first) : COMPOT_TILE;
        uint8_t slots[COMPOT_TILE][64], places[COMPOT_TILE][64], *unit = out + tiles->head;
        memset(out, 0, (size_t)tiles->head);
        memset(slots, 1 << (bits - 1), sizeof slots); /* rows that fill up the last tile are zero */
        memset(places, 0, sizeof places);
        for (int64_t g = 0; g < scales; g++)
            for (int r = 0; r < rows; r++) {
                const uint8_t *at = scale_at(leaf, row + r * leaf->row_bytes, tiles->fine ? g : 2 * g * tiles->per_scale);
                if (at) memcpy(out + 2 * (COMPOT_TILE * g + r), at, 2);
            }
        for (int64_t u = 0; u < tiles->units; u++, unit += tiles->unit_bytes) {
            uint8_t *plane = unit;
            for (int r = 0; r < rows; r++) read_unit(leaf, row + r * leaf->row_bytes, u, slots[r], places[r]);
            for (int from = 0, width; from < bits; plane += 8 * vectors * width, from += width) {
                width = bits == 3 ? 2 - from / 2 : bits;
                put_plane(slots, vectors, from, width, plane);
            }
            if (tiles->of > 1) put_plane(places, vectors, 0, 2, plane);
            if (tiles->of == 8) put_plane(places, vectors, 2, 1, plane + 128);
        }
    }
}

/* One unit. The same lines are compiled for each instruction set, and give the same bits in all. */
static inline __attribute__((always_inline)) void round_unit(const float *part, int8_t *q, float *scale, int32_t *sums) {
    uint32_t largest = 0; /* of the bits without sign: order of magnitudes, NaN above all */
    for (int i = 0; i < 64; i++) {
        uint32_t bits;
        memcpy(&bits, part + i, 4);
        bits &= 0x7fffffffu;
        largest = bits > largest ? bits : largest;
    }
    float peak;
    memcpy(&peak, &largest, 4);
    int finite = largest < 0x7f800000u;
    if (!finite || peak < 1e-30f) {
        memset(q, 0, 64);
        *scale = finite ? 0.0f : NAN;
        sums[0] = sums[1] = 0;
        return;
    }
    float inverse = 127.0f / peak;
    for (int half = 0; half < 2; half++) {
        int32_t added = 0;
        for (int i = 32 * half; i < 32 * half + 32; i++) {
            /* nearest even, by pushing the fraction out of the mantissa; the same on every machine */
            float shifted = part[i] * inverse + 12582912.0f;
            int32_t rounded;
            memcpy(&rounded, &shifted, 4);
            rounded -= 0x4b400000;
            q[i] = (int8_t)rounded;
            added += rounded;
        }
        sums[half] = added;
    }
    *scale = peak / 127.0f;
}


static void scalar_round(const float *part, int8_t *q, float *scale, int32_t *sums) { round_unit(part, q, scale, sums); }

/* --- portable kernels: a register is the four slots of one row --- */

static inline uint32_t scalar_load(const void *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    return word;
}
static inline uint32_t scalar_right(uint32_t v, int right) { return right < 0 ? v << -right : v >> right; }
static inline uint32_t scalar_eight(const int8_t *p, uint32_t at) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) word |= (uint32_t)(uint8_t)p[(at >> (8 * i)) & 7] << (8 * i);
    return word;
}
static inline int32_t scalar_dot(int32_t sum, uint32_t w, uint32_t x, int bits) {
    for (int i = 0; i < 32; i += 8) sum += ((int32_t)((w >> i) & 255) - (1 << (bits - 1))) * (int8_t)(x >> i);
    return sum;
}

#define ROWS 1
#define bytes_v uint32_t
#define ints_v int32_t
#define floats_v float
#define KERNEL(name) scalar_##name
#define FUNCTION static inline
#define UNROLL
#define PREFETCH(p) ((void)(p))
#define AHEAD 0
#define SIGNED(bits) 1
#define load_bytes(p) scalar_load(p)
#define shifted(v, right, mask) (scalar_right(v, right) & (mask) * 0x01010101u)
#define placed(v, right, base) (shifted(v, right, 3) | (base))
#define either(a, b) ((a) | (b))
#define four(p) scalar_load(p)
#define eight(p) (p)
#define true_values(v, bits) (v)
#define chosen_of(x, index) scalar_eight(x, index)
#define no_ints() 0
#define whole(n) (n)
#define dot(sum, w, x, bits) scalar_dot(sum, w, x, bits)
#define dot_chosen(dots, chosen, w, x, bits) (*(dots) = scalar_dot(*(dots), w, x, bits))
#define minus(a, b) ((a) - (b))
#define no_floats() 0.0f
#define halves(p) load_half(p)
#define times(v, f) ((v) * (f))
#define add_product(sum, v, ints) fmaf(v, (float)(ints), sum)
#define store(p, v) (*(p) = (v))
#include "kernels_tiles.h"

/* The eight lanes of the AVX2 version. */
static float float_dot(const compot_leaf *leaf, const uint8_t *row, const float *x) {
    float lanes[8] = {0};
    for (int64_t i = 0; i < leaf->inputs; i++) lanes[i & 7] += float_value(leaf, row, i) * x[i];
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

#if defined(__x86_64__) && defined(__GNUC__)
#define COMPOT_X86 1
#include <immintrin.h>
#include "kernels_avx2.h"
#include "kernels_avx512.h"
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define COMPOT_ARM 1
#include "kernels_neon.h"
#endif

static const kernel_set SCALAR = {scalar_round, scalar_product};
#ifdef COMPOT_X86
static const kernel_set AVX2 = {avx2_round, avx2_product}, AVX512 = {avx2_round, avx512_product};
#endif
#ifdef COMPOT_ARM
static const kernel_set NEON = {scalar_round, neon_product};
#endif

static const kernel_set *kernels = NULL;
static int in_force = -1;

int compot_best(void) {
#ifdef COMPOT_X86
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
        return COMPOT_AVX512;
    if (avx2) return COMPOT_AVX2;
#endif
#ifdef COMPOT_ARM
    return COMPOT_NEON;
#else
    return COMPOT_SCALAR;
#endif
}

int compot_use(int isa) {
    int best = compot_best();
    if (isa != COMPOT_SCALAR && !(isa == COMPOT_AVX2 && best == COMPOT_AVX512)) isa = best;
    kernels = &SCALAR;
#ifdef COMPOT_X86
    if (isa == COMPOT_AVX2) kernels = &AVX2;
    if (isa == COMPOT_AVX512) kernels = &AVX512;
#endif
#ifdef COMPOT_ARM
    if (isa == COMPOT_NEON) kernels = &NEON;
#endif
    in_force = isa;
    return in_force;
}

static const kernel_set *chosen_set(void) {
    if (!kernels) compot_use(compot_best());
    return kernels;
}

void compot_round(const float *x, int64_t n, int64_t first, int64_t last, compot_activation *out) {
    const kernel_set *set = chosen_set();
    for (int64_t u = first; u < last; u++) {
        float *part = out->x + 64 * u;
        int64_t left = n - 64 * u < 64 ? n - 64 * u : 64;
        memcpy(part, x + 64 * u, sizeof(float) * (size_t)left);
        memset(part + left, 0, sizeof(float) * (size_t)(64 - left));
        set->round(part, out->q + 64 * u, out->scale + u, out->sums + 2 * u);
    }
}

static void multiply_columns(const compot_leaf *leaf, int64_t first, int64_t last, const float *x, float *y, int add) {
    const uint8_t *scales = leaf->data;
    const int8_t *values = (const int8_t *)leaf->data + 2 * leaf->outputs;
    for (int64_t r = first; r < last; r += STRIP) {
        int64_t count = last - r < STRIP ? last - r : STRIP;
        float sums[STRIP] = {0};
        for (int64_t i = 0; i < leaf->inputs; i++) {
            const int8_t *column = values + i * leaf->outputs + r;
            float xi = x[i];
            for (int64_t j = 0; j < count; j++) sums[j] += xi * (float)column[j];
        }
        for (int64_t j = 0; j < count; j++) {
            float value = sums[j] * load_half(scales + 2 * (r + j));
            y[r + j] = add ? y[r + j] + value : value;
        }
    }
}

void compot_multiply(const compot_leaf *leaf, int64_t first, int64_t last, const compot_activation *x, int64_t tokens,
                     float *y, int64_t stride, int add) {
    if (leaf->kind == COMPOT_COLUMNS) {
        for (int64_t t = 0; t < tokens; t++) multiply_columns(leaf, first, last, x[t].x, y + t * stride, add);
        return;
    }
    for (int64_t r = first; r < last; r++)
        for (int64_t t = 0; t < tokens; t++) {
            const uint8_t *row = leaf->data + r * leaf->row_bytes;
#ifdef COMPOT_X86
            float value = in_force >= COMPOT_AVX2 ? avx2_float_dot(leaf, row, x[t].x) : float_dot(leaf, row, x[t].x);
#else
            float value = float_dot(leaf, row, x[t].x);
#endif
            y[t * stride + r] = add ? y[t * stride + r] + value : value;
        }
}

void compot_multiply_tiles(const compot_tiles *tiles, int64_t first, int64_t last, const compot_activation *x,
                           int64_t tokens, float *y, int64_t stride, int add) {
    const kernel_set *set = chosen_set();
    for (int64_t r = first; r < last; r += COMPOT_TILE) {
        const uint8_t *tile = tiles->data + r / COMPOT_TILE * tiles->tile_bytes;
        int64_t rows = last - r < COMPOT_TILE ? last - r : COMPOT_TILE;
        for (int64_t t = 0; t < tokens; t += 4) {
            int some = tokens - t < 4 ? (int)(tokens - t) : 4;
            float out[MOST_OUT];
            set->product(tiles, tile, x + t, some, out);
            for (int i = 0; i < some; i++) {
                float *target = y + (t + i) * stride + r;
                for (int64_t k = 0; k < rows; k++) target[k] = add ? target[k] + out[COMPOT_TILE * i + k] : out[COMPOT_TILE * i + k];
            }
        }
    }
}

void compot_row(const compot_leaf *leaf, int64_t row, float *out) {
    const uint8_t *bytes = leaf->data + row * leaf->row_bytes;
    if (leaf->kind == COMPOT_COLUMNS) {
        float scale = load_half(leaf->data + 2 * row);
        for (int64_t i = 0; i < leaf->inputs; i++)
            out[i] = scale * (float)(int8_t)leaf->data[(2 + i) * leaf->outputs + row];
        return;
    }
    if (leaf->kind <= COMPOT_BF16) {
        for (int64_t i = 0; i < leaf->inputs; i++) out[i] = float_value(leaf, bytes, i);
        return;
    }
    int sparse = leaf->kind == COMPOT_PLANES && leaf->of > 1, offset = 1 << (bits_of(leaf) - 1);
    for (int64_t u = 0; u < compot_units(leaf->inputs); u++) {
        uint8_t slots[64], places[32];
        int values[64] = {0};
        read_unit(leaf, bytes, u, slots, places);
        /* added, not stored: should a damaged file name one position twice, both count, as in the kernels */
        for (int s = 0; s < (sparse ? 32 : 64); s++)
            values[sparse ? s / (leaf->of / 2) * leaf->of + places[s] : s] += slots[s] - offset;
        for (int h = 0; h < 2; h++) {
            const uint8_t *at = scale_at(leaf, bytes, 2 * u + h);
            float d = at ? load_half(at) : 0;
            for (int i = 32 * h; i < 32 * h + 32 && 64 * u + i < leaf->inputs; i++) out[64 * u + i] = d * (float)values[i];
        }
    }
}

int compot_check(const compot_leaf *leaf) {
    if (!leaf || !leaf->data) return 1;
    if (leaf->inputs < 1 || leaf->outputs < 1 || leaf->inputs >= INT64_C(1) << 31 || leaf->outputs >= INT64_C(1) << 31)
        return 2;
    int64_t row;
    switch (leaf->kind) {
    case COMPOT_F32: row = 4 * leaf->inputs; break;
    case COMPOT_F16:
    case COMPOT_BF16: row = 2 * leaf->inputs; break;
    case COMPOT_Q4_0: row = (leaf->inputs + 31) / 32 * 18; break;
    case COMPOT_Q8_0: row = (leaf->inputs + 31) / 32 * 34; break;
    case COMPOT_COLUMNS:
        if (leaf->bits < 2 || leaf->bits > 8 || leaf->inputs > 32) return 3;
        return leaf->nbytes == leaf->outputs * (2 + leaf->inputs) && leaf->row_bytes == leaf->outputs ? 0 : 4;
    case COMPOT_PLANES:
        if (leaf->bits != 2 && leaf->bits != 3 && leaf->bits != 4 && leaf->bits != 8) return 3;
        if (leaf->of != 1 && leaf->of != 4 && leaf->of != 8) return 5;
        if (leaf->group < 1 || (leaf->group % 32 && leaf->group < leaf->inputs)) return 6;
        row = 2 * groups_of(leaf) + compot_units(leaf->inputs) * record_bytes(leaf);
        break;
    default: return 7;
    }
    return leaf->row_bytes == row && leaf->nbytes == row * leaf->outputs ? 0 : 4;
}

int compot_product(const compot_leaf *leaf, const float *x, int64_t tokens, float *y) {
    int wrong = compot_check(leaf);
    if (wrong) return wrong;
    if (tokens < 1) return 8;
    compot_tiles tiles;
    int64_t units = compot_units(leaf->inputs), tiled = compot_tiles_of(leaf, &tiles);
    compot_activation *a = calloc((size_t)tokens, sizeof *a);
    float *floats = malloc(sizeof(float) * (size_t)(tokens * units * COMPOT_UNIT_FLOATS));
    int8_t *bytes = malloc((size_t)(tokens * units * 64));
    uint8_t *data = malloc((size_t)tiled + 1);
    int result = 9;
    if (a && floats && bytes && data) {
        chosen_set();
        for (int64_t t = 0; t < tokens; t++) {
            compot_activation_at(&a[t], units, floats + t * units * COMPOT_UNIT_FLOATS, bytes + t * units * 64);
            compot_round(x + t * leaf->inputs, leaf->inputs, 0, units, &a[t]);
        }
        if (tiled) {
            compot_tile(leaf, &tiles, data);
            compot_multiply_tiles(&tiles, 0, leaf->outputs, a, tokens, y, leaf->outputs, 0);
        } else {
            compot_multiply(leaf, 0, leaf->outputs, a, tokens, y, leaf->outputs, 0);
        }
        result = 0;
    }
    free(a), free(floats), free(bytes), free(data);
    return result;
}
