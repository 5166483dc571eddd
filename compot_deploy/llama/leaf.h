/* The bytes of a leaf, read: half precision, planes of slots, scales. See kernels.h for what a leaf is. */
#ifndef COMPOT_LEAF_H
#define COMPOT_LEAF_H

#include "kernels.h"

#include <string.h>

static inline float half_to_float(uint16_t h) {
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

static inline float load_half(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return half_to_float(h);
}

static inline float load_bfloat(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    uint32_t bits = (uint32_t)h << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline int slots_of(const compot_leaf *leaf) { return leaf->of == 1 ? 64 : 32; }

static inline int64_t value_bytes(const compot_leaf *leaf) { return (int64_t)slots_of(leaf) * leaf->bits / 8; }

static inline int64_t record_bytes(const compot_leaf *leaf) {
    int position_bits = leaf->of == 1 ? 0 : leaf->of == 4 ? 2 : 3;
    return (int64_t)slots_of(leaf) * (leaf->bits + position_bits) / 8;
}

static inline int64_t groups_of(const compot_leaf *leaf) { return (leaf->inputs + leaf->group - 1) / leaf->group; }

/* One plane of slots: bits 1, 2 or 4 per slot, slot j * (slots * bits / 8) + i in byte i at bit j * bits. */
static inline void unpack_plane(const uint8_t *plane, int slots, int bits, uint8_t *out) {
    int bytes = slots * bits / 8, mask = (1 << bits) - 1;
    for (int j = 0; j < 8 / bits; j++)
        for (int i = 0; i < bytes; i++) out[j * bytes + i] = (uint8_t)((plane[i] >> (j * bits)) & mask);
}

/* The width of the integers of a leaf; what is stored is larger by half of their range. */
static inline int bits_of(const compot_leaf *leaf) {
    return leaf->kind == COMPOT_Q4_0 ? 4 : leaf->kind == COMPOT_Q8_0 ? 8 : leaf->bits;
}

/* The slots of 64 inputs of a row: unsigned, offset included, and for sparse ones where they belong in their group. */
static inline void read_unit(const compot_leaf *leaf, const uint8_t *row, int64_t u, uint8_t slots[64], uint8_t places[32]) {
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
static inline const uint8_t *scale_at(const compot_leaf *leaf, const uint8_t *row, int64_t h) {
    if (leaf->kind == COMPOT_PLANES) {
        int64_t g = h * 32 / leaf->group, last = groups_of(leaf) - 1;
        return row + 2 * (g < last ? g : last);
    }
    return h < (leaf->inputs + 31) / 32 ? row + h * (leaf->kind == COMPOT_Q4_0 ? 18 : 34) : NULL;
}

static inline float float_value(const compot_leaf *leaf, const uint8_t *row, int64_t i) {
    float w;
    if (leaf->kind != COMPOT_F32) return leaf->kind == COMPOT_F16 ? load_half(row + 2 * i) : load_bfloat(row + 2 * i);
    memcpy(&w, row + 4 * i, 4);
    return w;
}

#endif
