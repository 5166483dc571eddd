/* See kernels.h. This file: checks, rounding, decoding and the portable dot products, and the choice at run time. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK 64 /* units whose scales are expanded at a time: 4096 inputs, 512 bytes of stack */

/* Neighbouring rows times one token; a row's result does not depend on how many there are. */
typedef void (*dots_function)(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, int rows, float *out);
/* Four decoded rows times one token. */
typedef void (*block_function)(const int8_t *const w[4], const float *const d[4], int64_t units,
                               const compot_activation *x, float out[4]);
typedef void (*decode_function)(const compot_leaf *leaf, const uint8_t *row, int8_t *w, float *d);

enum { STRIP = 64 }; /* rows handed to a kernel at a time */

typedef void (*round_function)(const float *part, int8_t *q, float *scale, float *sum, float *total);

typedef struct {
    round_function round;
    dots_function dots;
    block_function block;
    decode_function decode;
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

/* What stored values are too large by. */
static int offset_of(const compot_leaf *leaf) {
    if (leaf->kind == COMPOT_Q4_0) return 8;
    if (leaf->kind == COMPOT_PLANES && leaf->bits < 8) return 1 << (leaf->bits - 1);
    return 0;
}

static int slots_of(const compot_leaf *leaf) { return leaf->of == 1 ? 64 : 32; }

static int64_t value_bytes(const compot_leaf *leaf) { return (int64_t)slots_of(leaf) * leaf->bits / 8; }

static int64_t record_bytes(const compot_leaf *leaf) {
    int position_bits = leaf->of == 1 ? 0 : leaf->of == 4 ? 2 : 3;
    return (int64_t)slots_of(leaf) * (leaf->bits + position_bits) / 8;
}

static int64_t groups_of(const compot_leaf *leaf) { return (leaf->inputs + leaf->group - 1) / leaf->group; }

/* Scales of a planes row, one per half: halves [first, first + count). */
static void plane_scales(const compot_leaf *leaf, const uint8_t *row, int64_t first, int64_t count, float *out) {
    int64_t last = groups_of(leaf) - 1, group = leaf->group;
    if (group == 64) { /* the common case: no division */
        for (int64_t i = 0; i < count; i++) {
            int64_t g = (first + i) >> 1;
            out[i] = load_half(row + 2 * (g < last ? g : last));
        }
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        int64_t g = (first + i) * 32 / group;
        out[i] = load_half(row + 2 * (g < last ? g : last));
    }
}

/* One plane of slots: bits 1, 2 or 4 per slot, slot j * (slots * bits / 8) + i in byte i at bit j * bits. */
static void unpack_plane(const uint8_t *plane, int slots, int bits, uint8_t *out) {
    int bytes = slots * bits / 8;
    for (int s = 0; s < slots; s++) out[s] = (uint8_t)((plane[s % bytes] >> (s / bytes * bits)) & ((1 << bits) - 1));
}

/* Stored values of one record, offset included; 8-bit values are signed. */
static void record_values(const uint8_t *record, int slots, int bits, int8_t *out) {
    uint8_t low[64], high[64];
    if (bits == 8) {
        memcpy(out, record, (size_t)slots);
        return;
    }
    if (bits == 3) {
        unpack_plane(record, slots, 2, low);
        unpack_plane(record + slots / 4, slots, 1, high);
        for (int s = 0; s < slots; s++) out[s] = (int8_t)(low[s] | high[s] << 2);
        return;
    }
    unpack_plane(record, slots, bits, low);
    for (int s = 0; s < slots; s++) out[s] = (int8_t)low[s];
}

static void record_positions(const uint8_t *planes, int of, uint8_t *out) {
    unpack_plane(planes, 32, 2, out);
    if (of == 8) {
        uint8_t high[32];
        unpack_plane(planes + 8, 32, 1, high);
        for (int s = 0; s < 32; s++) out[s] |= (uint8_t)(high[s] << 2);
    }
}

/* A row as int8 per input, true values (no offset), and one scale per half; units * 64 and units * 2 entries. */
static void decode_row(const compot_leaf *leaf, const uint8_t *row, int8_t *w, float *d) {
    int64_t units = compot_units(leaf->inputs), halves = 2 * units, blocks = (leaf->inputs + 31) / 32;
    if (leaf->kind == COMPOT_Q8_0 || leaf->kind == COMPOT_Q4_0) {
        for (int64_t h = 0; h < halves; h++) {
            if (h >= blocks) {
                memset(w + 32 * h, 0, 32);
                d[h] = 0;
            } else if (leaf->kind == COMPOT_Q8_0) {
                d[h] = load_half(row + 34 * h);
                memcpy(w + 32 * h, row + 34 * h + 2, 32);
            } else {
                const uint8_t *block = row + 18 * h;
                d[h] = load_half(block);
                for (int i = 0; i < 16; i++) {
                    w[32 * h + i] = (int8_t)((block[2 + i] & 15) - 8);
                    w[32 * h + 16 + i] = (int8_t)((block[2 + i] >> 4) - 8);
                }
            }
        }
        return;
    }
    const uint8_t *record = row + 2 * groups_of(leaf);
    int64_t stride = record_bytes(leaf), positions_at = value_bytes(leaf);
    int offset = offset_of(leaf), slots = slots_of(leaf);
    plane_scales(leaf, row, 0, halves, d);
    for (int64_t u = 0; u < units; u++, record += stride) {
        int8_t *target = w + 64 * u, values[64];
        record_values(record, slots, leaf->bits, values);
        if (leaf->of == 1) {
            for (int i = 0; i < 64; i++) target[i] = (int8_t)(values[i] - offset);
        } else {
            uint8_t positions[32];
            int kept = leaf->of / 2;
            record_positions(record + positions_at, leaf->of, positions);
            memset(target, 0, 64);
            /* added, not stored: should a damaged file name one position twice, both count, as in the dot products */
            for (int s = 0; s < 32; s++) {
                int8_t *slot = target + s / kept * leaf->of + positions[s];
                *slot = (int8_t)(*slot + values[s] - offset);
            }
        }
    }
}

/* --- portable dot products: integers are exact, floats are summed in eight lanes like the AVX2 kernels do --- */

static float dot_integers(const int8_t *w, const float *d, int64_t halves, const compot_activation *x) {
    float sum = 0;
    for (int64_t h = 0; h < halves; h++) {
        int32_t dot = 0;
        for (int i = 0; i < 32; i++) dot += (int32_t)w[32 * h + i] * x->q[32 * h + i];
        sum += d[h] * x->scale[h >> 1] * (float)dot;
    }
    return sum;
}

static float scalar_dot(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x) {
    /* unit by unit, so that no buffer depends on the inputs */
    int64_t units = compot_units(leaf->inputs), blocks = (leaf->inputs + 31) / 32;
    int8_t w[64];
    float d[2], sum = 0;
    if (leaf->kind == COMPOT_Q4_0 || leaf->kind == COMPOT_Q8_0) {
        compot_leaf block = *leaf;
        int64_t size = leaf->kind == COMPOT_Q4_0 ? 18 : 34;
        block.inputs = 32;
        for (int64_t h = 0; h < blocks; h++) {
            decode_row(&block, row + size * h, w, d);
            compot_activation part = {x->q + 32 * h, x->scale + (h >> 1), NULL, NULL, NULL};
            sum += dot_integers(w, d, 1, &part);
        }
        return sum;
    }
    const uint8_t *record = row + 2 * groups_of(leaf);
    int64_t stride = record_bytes(leaf);
    int offset = offset_of(leaf), slots = slots_of(leaf), kept = leaf->of / 2;
    for (int64_t u = 0; u < units; u++, record += stride) {
        int8_t values[64];
        int32_t dots[2] = {0, 0};
        record_values(record, slots, leaf->bits, values);
        plane_scales(leaf, row, 2 * u, 2, d);
        if (leaf->of == 1) {
            for (int i = 0; i < 64; i++) dots[i >> 5] += (values[i] - offset) * x->q[64 * u + i];
        } else {
            uint8_t positions[32];
            record_positions(record + value_bytes(leaf), leaf->of, positions);
            for (int s = 0; s < 32; s++)
                dots[s >> 4] += (values[s] - offset) * x->q[64 * u + s / kept * leaf->of + positions[s]];
        }
        for (int h = 0; h < 2; h++) sum += d[h] * x->scale[u] * (float)dots[h];
    }
    return sum;
}

/* One unit. The same lines are compiled for each instruction set, and give the same bits in all. */
static inline __attribute__((always_inline)) void round_unit(const float *part, int8_t *q, float *scale, float *sum,
                                                             float *total) {
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
        *scale = sum[0] = sum[1] = *total = finite ? 0.0f : NAN;
        return;
    }
    float inverse = 127.0f / peak;
    int32_t sums[2] = {0, 0};
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
    sum[0] = *scale * (float)sums[0];
    sum[1] = *scale * (float)sums[1];
    *total = *scale * (float)(sums[0] + sums[1]);
}

static void scalar_round(const float *part, int8_t *q, float *scale, float *sum, float *total) {
    round_unit(part, q, scale, sum, total);
}

static void scalar_dots(const compot_leaf *leaf, const uint8_t *row, const compot_activation *x, int rows, float *out) {
    for (int r = 0; r < rows; r++) out[r] = scalar_dot(leaf, row + r * leaf->row_bytes, x);
}

static void scalar_block(const int8_t *const w[4], const float *const d[4], int64_t units,
                         const compot_activation *x, float out[4]) {
    for (int r = 0; r < 4; r++) out[r] = dot_integers(w[r], d[r], 2 * units, x);
}

static float float_dot(const compot_leaf *leaf, const uint8_t *row, const float *x) {
    float lanes[8] = {0};
    int64_t n = leaf->inputs;
    for (int64_t i = 0; i < n; i++) {
        float w;
        if (leaf->kind == COMPOT_F32) memcpy(&w, row + 4 * i, 4);
        else w = leaf->kind == COMPOT_F16 ? load_half(row + 2 * i) : load_bfloat(row + 2 * i);
        lanes[i & 7] += w * x[i];
    }
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

#if defined(__x86_64__) && defined(__GNUC__)
#define COMPOT_X86 1
#include "kernels_avx2.h"
#include "kernels_avx512.h"
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define COMPOT_ARM 1
#include "kernels_neon.h"
#endif

static const kernel_set SCALAR = {scalar_round, scalar_dots, scalar_block, decode_row};
#ifdef COMPOT_X86
static const kernel_set AVX2 = {avx2_round, avx2_dots, avx2_block, avx2_decode};
static const kernel_set AVX512 = {avx2_round, avx512_dots, avx512_block, avx2_decode};
#endif
#ifdef COMPOT_ARM
static const kernel_set NEON = {scalar_round, neon_dots, neon_block, decode_row};
#endif

static const kernel_set *kernels = NULL;
static int in_force = -1;

int compot_best(void) {
#ifdef COMPOT_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx2") &&
        __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return COMPOT_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return COMPOT_AVX2;
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
    if (isa == COMPOT_AVX512) {
        avx512_prepare();
        kernels = &AVX512;
    }
#endif
#ifdef COMPOT_ARM
    if (isa == COMPOT_NEON) kernels = &NEON;
#endif
    in_force = isa;
    return in_force;
}

static const kernel_set *chosen(void) {
    if (!kernels) compot_use(compot_best());
    return kernels;
}

void compot_round(const float *x, int64_t n, int64_t first, int64_t last, compot_activation *out) {
    for (int64_t u = first; u < last; u++) {
        float part[64];
        int64_t left = n - 64 * u;
        memset(part, 0, sizeof part);
        memcpy(part, x + 64 * u, sizeof(float) * (size_t)(left < 64 ? left : 64));
        memcpy(out->x + 64 * u, part, sizeof part);
        chosen()->round(part, out->q + 64 * u, out->scale + u, out->sum + 2 * u, out->total + u);
    }
}

size_t compot_scratch(int64_t inputs) {
    return 4 * (size_t)compot_units(inputs) * (64 + 2 * sizeof(float)) + 64;
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
                     float *y, int64_t stride, int add, void *scratch) {
    if (leaf->kind == COMPOT_COLUMNS) {
        for (int64_t t = 0; t < tokens; t++) multiply_columns(leaf, first, last, x[t].x, y + t * stride, add);
        return;
    }
    if (leaf->kind <= COMPOT_BF16) {
        for (int64_t r = first; r < last; r++)
            for (int64_t t = 0; t < tokens; t++) {
#ifdef COMPOT_X86
                float value = in_force >= COMPOT_AVX2 ? avx2_float_dot(leaf, leaf->data + r * leaf->row_bytes, x[t].x)
                                                      : float_dot(leaf, leaf->data + r * leaf->row_bytes, x[t].x);
#else
                float value = float_dot(leaf, leaf->data + r * leaf->row_bytes, x[t].x);
#endif
                y[t * stride + r] = add ? y[t * stride + r] + value : value;
            }
        return;
    }
    const kernel_set *set = chosen();
    int64_t r = first;
    if (tokens >= 4) { /* decoding a row pays when several tokens use it */
        int64_t units = compot_units(leaf->inputs);
        float *d = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
        int8_t *w = (int8_t *)(d + 8 * units);
        const int8_t *rows[4];
        const float *scales[4];
        for (; r < last; r += 4) {
            int64_t count = last - r < 4 ? last - r : 4;
            for (int i = 0; i < 4; i++) { /* beyond the end the last row is repeated and its result dropped */
                int k = i < count ? i : 0;
                rows[i] = w + 64 * units * k;
                scales[i] = d + 2 * units * k;
                if (k == i) set->decode(leaf, leaf->data + (r + i) * leaf->row_bytes, w + 64 * units * i, d + 2 * units * i);
            }
            for (int64_t t = 0; t < tokens; t++) {
                float out[4];
                set->block(rows, scales, units, &x[t], out);
                float *target = y + t * stride + r;
                for (int64_t i = 0; i < count; i++) target[i] = add ? target[i] + out[i] : out[i];
            }
        }
        return;
    }
    for (; r < last; r += STRIP) {
        int count = last - r < STRIP ? (int)(last - r) : STRIP;
        for (int64_t t = 0; t < tokens; t++) {
            float out[STRIP], *target = y + t * stride + r;
            set->dots(leaf, leaf->data + r * leaf->row_bytes, &x[t], count, out);
            for (int i = 0; i < count; i++) target[i] = add ? target[i] + out[i] : out[i];
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
        for (int64_t i = 0; i < leaf->inputs; i++) {
            if (leaf->kind == COMPOT_F32) memcpy(out + i, bytes + 4 * i, 4);
            else out[i] = leaf->kind == COMPOT_F16 ? load_half(bytes + 2 * i) : load_bfloat(bytes + 2 * i);
        }
        return;
    }
    int64_t blocks = (leaf->inputs + 31) / 32;
    if (leaf->kind == COMPOT_PLANES) {
        const uint8_t *record = bytes + 2 * groups_of(leaf);
        compot_leaf unit = *leaf;
        uint8_t one[2 + 128];
        unit.inputs = 64;
        unit.group = 64;
        for (int64_t u = 0; u < compot_units(leaf->inputs); u++, record += record_bytes(leaf)) {
            int8_t w[64];
            float ones[2], d[2];
            one[0] = 0;
            one[1] = 0x3c; /* 1.0 as a half */
            memcpy(one + 2, record, (size_t)record_bytes(leaf));
            decode_row(&unit, one, w, ones);
            plane_scales(leaf, bytes, 2 * u, 2, d);
            for (int i = 0; i < 64 && 64 * u + i < leaf->inputs; i++) out[64 * u + i] = d[i >> 5] * (float)w[i];
        }
        return;
    }
    compot_leaf block = *leaf;
    int64_t size = leaf->kind == COMPOT_Q4_0 ? 18 : 34;
    block.inputs = 32;
    for (int64_t h = 0; h < blocks; h++) {
        int8_t w[64];
        float d[2];
        decode_row(&block, bytes + size * h, w, d);
        for (int i = 0; i < 32 && 32 * h + i < leaf->inputs; i++) out[32 * h + i] = d[0] * (float)w[i];
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
    int64_t units = compot_units(leaf->inputs);
    compot_activation *a = calloc((size_t)tokens, sizeof *a);
    float *floats = malloc(sizeof(float) * (size_t)(tokens * units * COMPOT_UNIT_FLOATS));
    int8_t *bytes = malloc((size_t)(tokens * units * 64));
    void *scratch = malloc(compot_scratch(leaf->inputs));
    int result = 9;
    if (a && floats && bytes && scratch) {
        chosen();
        for (int64_t t = 0; t < tokens; t++) {
            a[t].q = bytes + t * units * 64;
            a[t].x = floats + t * units * COMPOT_UNIT_FLOATS;
            a[t].scale = a[t].x + units * 64;
            a[t].sum = a[t].scale + units;
            a[t].total = a[t].sum + 2 * units;
            compot_round(x + t * leaf->inputs, leaf->inputs, 0, units, &a[t]);
        }
        compot_multiply(leaf, 0, leaf->outputs, a, tokens, y, leaf->outputs, 0, scratch);
        result = 0;
    }
    free(a), free(floats), free(bytes), free(scratch);
    return result;
}
