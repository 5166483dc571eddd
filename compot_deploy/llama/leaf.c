/* See kernels.h. This file: whether a leaf can be true, and its rows as floats. */
#include "leaf.h"

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
