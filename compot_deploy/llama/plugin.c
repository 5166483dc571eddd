/* See plugin.h. This file: the matrices that the plug-in is given, and the memory that it needs for them. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "plugin.h"

#include <stdlib.h>
#if !defined(_WIN32)
#include <sys/mman.h>
#endif

enum { HUGE_PAGE = 1 << 21 };

COMPOT_API void compot_plugin_free(plugin *p) {
    if (!p) return;
    for (int i = 0; i < p->stored; i++) free(p->stores[i].memory);
    free(p->stores), free(p->neutral), free(p->weights);
    free(p->linears), free(p->x), free(p->z_raw), free(p->floats), free(p->bytes);
    for (int i = 0; i < MAX_PAIRS; i++) free(p->z[i]);
    free(p);
}

COMPOT_API plugin *compot_plugin_new(int op_mul_mat, int op_get_rows, int op_custom, int op_add, int op_mul, int capacity,
                                     int64_t max_tokens, int threads) {
    if (capacity < 1 || max_tokens < 1 || threads < 1) return NULL;
    plugin *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->linears = calloc((size_t)capacity, sizeof *p->linears);
    p->stores = calloc((size_t)capacity * 2 * MAX_PAIRS, sizeof *p->stores);
    if (!p->linears || !p->stores) {
        free(p->linears), free(p->stores), free(p);
        return NULL;
    }
    p->op_add = op_add, p->op_mul = op_mul;
    p->op_mul_mat = op_mul_mat, p->op_get_rows = op_get_rows, p->op_custom = op_custom;
    p->capacity = capacity, p->max_tokens = max_tokens, p->threads = threads;
    p->epoch = 1, p->last_bundle = -1;
    return p;
}

/* Tiles of a leaf, in pages of 2 MB where the system has them. Returns 0, or 23 without memory. */
static int set_part(plugin *p, part *m, const compot_leaf *leaf) {
    m->leaf = *leaf;
    int64_t bytes = compot_tiles_of(leaf, &m->tiles);
    m->tiled = bytes > 0 && !p->exact;
    if (!m->tiled) return 0;
    for (int i = 0; i < p->stored; i++)
        if (p->stores[i].source == leaf->data) {
            m->tiles.data = p->stores[i].data;
            return 0;
        }
    const size_t page = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    void *memory = malloc((size_t)bytes + page);
    if (!memory) return 23;
    uint8_t *data = (uint8_t *)(((uintptr_t)memory + page - 1) & ~(uintptr_t)(page - 1));
#if defined(__linux__)
    if (page == HUGE_PAGE) madvise(data, (size_t)bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    compot_tile(leaf, &m->tiles, data);
    p->stores[p->stored++] = (store){leaf->data, memory, data};
    p->tile_bytes += bytes;
    return 0;
}

/* Adds a matrix: leaves are dictionary, codes, dictionary, codes …, or one leaf when pairs is 0. The bundle ROWS_ONLY
 * is an embedding, whose rows are read from the file and which is never multiplied.
 * Returns 0, or a number that says what is wrong (compot_check's, or 20 and above; 23 is no memory). */
COMPOT_API int compot_plugin_add(plugin *p, const char *name, int pairs, const compot_leaf *leaves, int32_t bundle) {
    if (p->count >= p->capacity || pairs < 0 || pairs > MAX_PAIRS || strlen(name) >= NAME) return 20;
    linear *l = &p->linears[p->count];
    int wrong = 0;
    memset(l, 0, sizeof *l);
    strcpy(l->name, name);
    l->pairs = pairs, l->bundle = pairs || bundle == ROWS_ONLY ? bundle : -1;
    for (int i = 0; i < (pairs ? 2 * pairs : 1); i++)
        if ((wrong = compot_check(&leaves[i]))) return wrong;
    l->inputs = leaves[0].inputs, l->outputs = leaves[pairs ? 1 : 0].outputs;
    for (int i = 0; i < pairs; i++) {
        if (leaves[2 * i].outputs != leaves[2 * i + 1].inputs) return 21;
        if (leaves[2 * i].inputs != l->inputs || leaves[2 * i + 1].outputs != l->outputs) return 22;
        l->atoms += leaves[2 * i].outputs;
    }
    for (int i = 0; i < pairs; i++)
        if ((wrong = set_part(p, &l->dictionaries[i], &leaves[2 * i])) || (wrong = set_part(p, &l->codes[i], &leaves[2 * i + 1])))
            return wrong;
    if (!pairs && bundle == ROWS_ONLY) l->codes[0].leaf = leaves[0];
    else if (!pairs && (wrong = set_part(p, &l->codes[0], &leaves[0]))) return wrong;
    if (l->inputs > p->wide) p->wide = l->inputs;
    if (l->atoms > p->atoms) p->atoms = l->atoms;
    p->count++;
    return 0;
}

/* Names of tensors that hold only ones (`.scale`) or zeros (`.bias`). Returns 0, 20 for a long name, or 30. */
COMPOT_API int compot_plugin_neutral(plugin *p, const char *name) {
    if (strlen(name) >= NAME) return 20;
    void *grown = realloc(p->neutral, sizeof *p->neutral * (size_t)(p->neutral_count + 1));
    if (!grown) return 30;
    p->neutral = grown;
    memset(p->neutral[p->neutral_count], 0, NAME);
    strcpy(p->neutral[p->neutral_count++], name);
    qsort(p->neutral, (size_t)p->neutral_count, NAME, compare_names);
    return 0;
}

/* Bytes of all tiles. */
COMPOT_API int64_t compot_plugin_bytes(const plugin *p) { return p->tile_bytes; }

static int by_name(const void *a, const void *b) { return strncmp(((const linear *)a)->name, ((const linear *)b)->name, NAME); }

/* Floats and bytes of `tokens` activations of n inputs, cut from the buffers. */
static void cut(compot_activation *a, int64_t tokens, int64_t n, float **floats, int8_t **bytes) {
    int64_t units = compot_units(n);
    for (int64_t t = 0; t < tokens; t++) {
        compot_activation_at(&a[t], units, *floats, *bytes);
        *floats += COMPOT_UNIT_FLOATS * units, *bytes += COMPOT_UNIT_BYTES * units;
    }
}

/* After the last add: sorts the names and allocates. Returns 0, or 30 without memory, or 31 for a name twice. */
COMPOT_API int compot_plugin_ready(plugin *p) {
    qsort(p->linears, (size_t)p->count, sizeof *p->linears, by_name);
    int64_t widest[MAX_PAIRS] = {0}, units = compot_units(p->wide);
    for (int i = 0; i < p->count; i++) {
        linear *l = &p->linears[i];
        if (i && !by_name(l - 1, l)) return 31;
        l->owner = p;
        l->fresh = (operation){l, false, false}, l->rounded = (operation){l, true, false}, l->again = (operation){l, true, true};
        for (int k = 0; k < l->pairs; k++)
            if (l->codes[k].leaf.inputs > widest[k]) widest[k] = l->codes[k].leaf.inputs;
    }
    for (int k = 0; k < MAX_PAIRS; k++) units += compot_units(widest[k]);
    size_t tokens = (size_t)p->max_tokens + (size_t)p->threads;
    p->floats = malloc(tokens * (size_t)units * COMPOT_UNIT_FLOATS * sizeof(float));
    p->bytes = malloc(tokens * (size_t)units * COMPOT_UNIT_BYTES);
    p->z_raw = malloc(tokens * (size_t)(p->atoms ? p->atoms : 1) * sizeof(float));
    p->x = calloc(tokens, sizeof *p->x);
    p->longest = p->wide > p->atoms ? p->wide : p->atoms;
    if (p->exact && !(p->weights = malloc((size_t)p->threads * (size_t)p->longest * sizeof(float)))) return 30;
    if (!p->floats || !p->bytes || !p->z_raw || !p->x) return 30;
    float *floats = p->floats;
    int8_t *bytes = p->bytes;
    cut(p->x, (int64_t)tokens, p->wide, &floats, &bytes);
    for (int k = 0; k < MAX_PAIRS; k++) {
        if (!(p->z[k] = calloc(tokens, sizeof *p->z[k]))) return 30;
        cut(p->z[k], (int64_t)tokens, widest[k], &floats, &bytes);
    }
    return 0;
}

/* Computes everything in floating point, from the file; before the first add. */
COMPOT_API void compot_plugin_exact(plugin *p, int exact) { p->exact = exact != 0; }

/* What went wrong since the last question, or an empty string. */
COMPOT_API const char *compot_plugin_error(plugin *p) {
    return atomic_exchange(&p->failed, 0) ? p->error : "";
}

/* How many nodes were computed here. */
COMPOT_API int64_t compot_plugin_runs(plugin *p) { return (int64_t)atomic_load(&p->runs); }
