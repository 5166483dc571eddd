/* See kernels.h. This file: rounding, the portable kernels, and the choice at run time. */
#include "leaf.h"

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
