/* See kernels.h. This file: a leaf of integers rearranged into tiles. */
#include "leaf.h"

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
