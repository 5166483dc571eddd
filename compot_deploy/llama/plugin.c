/* Factorised matrices inside an unmodified llama.cpp.
 *
 * llama.cpp asks a public callback (cb_eval) about every node of its graph before it computes it. A MUL_MAT whose
 * weight is one of ours becomes a CUSTOM node that calls run_linear from llama.cpp's own threads; a GET_ROWS on an
 * embedding of ours becomes one that calls run_rows. Nothing here is compiled against llama.cpp: the layout of
 * ggml_tensor below is compared with the library when it is loaded (library.py), and refused if it differs. */
#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "kernels.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(_WIN32)
#include <sched.h>
#include <sys/mman.h>
#define GIVE_WAY() sched_yield()
#else
#define GIVE_WAY() ((void)0)
#endif

enum { HUGE_PAGE = 1 << 21, ROWS_ONLY = -2 };
enum { NAME = 64, MAX_PAIRS = 4, MAX_SOURCES = 10, TYPE_F32 = 0, TYPE_I32 = 26, OP_NONE = 0 };

typedef struct tensor {
    int32_t type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    struct tensor *src[MAX_SOURCES];
    struct tensor *view_src;
    size_t view_offs;
    void *data;
    char name[NAME];
    void *extra;
    char padding[8];
} tensor;

_Static_assert(sizeof(void *) == 8, "llama.cpp's 64-bit layout is the only one that is checked");
_Static_assert(offsetof(tensor, op) == 80 && offsetof(tensor, src) == 152, "layout of ggml_tensor");
_Static_assert(offsetof(tensor, data) == 248 && offsetof(tensor, name) == 256, "layout of ggml_tensor");

/* What ggml keeps in op_params of a CUSTOM node. */
typedef struct {
    void (*function)(tensor *, int, int, void *);
    int32_t tasks;
    void *data;
} custom_params;

typedef struct plugin plugin;
typedef struct linear linear;

/* A matrix of integers is multiplied from its tiles, others from the file. */
typedef struct {
    compot_leaf leaf;
    compot_tiles tiles;
    bool tiled;
} part;

/* Tiles of a leaf: made once, also when several matrices share it. */
typedef struct {
    const uint8_t *source;
    void *memory;
    const uint8_t *data;
} store;

typedef struct {
    linear *of;
    bool rounded; /* the node before rounded the same input */
    bool reuse;   /* and multiplied it with the same dictionaries */
} operation;

struct linear {
    char name[NAME];
    plugin *owner;
    int pairs;         /* 0: one plain leaf, in codes[0] */
    int32_t bundle;    /* linears with one bundle have the same dictionaries; -1 shares nothing, ROWS_ONLY: see add */
    int64_t inputs, outputs, atoms;
    part dictionaries[MAX_PAIRS], codes[MAX_PAIRS];
    uint64_t asked;
    operation fresh, rounded, again;
};

struct plugin {
    int op_mul_mat, op_get_rows, op_custom, op_add, op_mul;
    int capacity, count, threads, stored, neutral_count;
    char (*neutral)[NAME];
    store *stores;
    int64_t tile_bytes;
    bool exact; /* activations as they are, sums in double: slow, for comparisons */
    float *weights; /* then: one row of each thread */
    int64_t max_tokens, wide, atoms, longest; /* widest input, and most atoms of one linear */
    linear *linears;
    /* scratch, shared by all nodes: they run one after the other */
    compot_activation *x, *z[MAX_PAIRS]; /* of max_tokens tokens, and then one of each thread */
    float *z_raw, *floats;
    int8_t *bytes;
    /* state of the graph that is being asked about */
    uint64_t epoch;
    int32_t last_bundle;
    const tensor *last_input;
    atomic_int ran, failed;
    atomic_llong runs;
    char error[256];
    /* barrier of the threads inside one node */
    atomic_int waiting, generation;
};

static void fail(plugin *p, const char *what, const char *name) {
    int none = 0;
    if (atomic_compare_exchange_strong(&p->failed, &none, 1))
        snprintf(p->error, sizeof p->error, "%s: %s", name, what);
}

static void wait_for_all(plugin *p, int threads) {
    if (threads == 1) return;
    int generation = atomic_load(&p->generation);
    if (atomic_fetch_add(&p->waiting, 1) == threads - 1) {
        atomic_store(&p->waiting, 0);
        atomic_fetch_add(&p->generation, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&p->generation, memory_order_acquire) == generation; spins++)
        if (spins > 4000) GIVE_WAY();
}

/* Share `ith` of `nth` of a range, in multiples of 16 rows. */
static int64_t share(int64_t total, int ith, int nth) {
    return ith >= nth ? total : (total * ith / nth) & ~(int64_t)15;
}

/* Rounds `tokens` vectors of n floats, `stride` bytes apart, divided among the threads by unit. */
static void round_all(const char *x, size_t stride, int64_t n, int64_t tokens, compot_activation *out, int ith, int nth) {
    int64_t units = compot_units(n), total = tokens * units, at = total * ith / nth, end = total * (ith + 1) / nth;
    while (at < end) {
        int64_t t = at / units, first = at % units, last = first + (end - at);
        if (last > units) last = units;
        compot_round((const float *)(const void *)(x + (size_t)t * stride), n, first, last, &out[t]);
        at += last - first;
    }
}

/* One token is rounded by every thread for itself, which is quicker than to wait for the others. */
static compot_activation *rounded_for(compot_activation *all, const plugin *p, const char *x, size_t stride, int64_t n,
                                      int64_t tokens, int ith, int nth) {
    if (tokens == 1) {
        compot_activation *own = all + p->max_tokens + ith;
        round_all(x, stride, n, 1, own, 0, 1);
        return own;
    }
    round_all(x, stride, n, tokens, all, ith, nth);
    return all;
}

static void multiply(const plugin *p, const part *m, int ith, int nth, const compot_activation *x, int64_t tokens, float *y,
                     int64_t stride, int add) {
    int64_t first = share(m->leaf.outputs, ith, nth), last = share(m->leaf.outputs, ith + 1, nth);
    if (!p->exact) {
        if (m->tiled) compot_multiply_tiles(&m->tiles, first, last, x, tokens, y, stride, add);
        else compot_multiply(&m->leaf, first, last, x, tokens, y, stride, add);
        return;
    }
    float *weights = p->weights + ith * p->longest;
    for (int64_t r = first; r < last; r++) {
        compot_row(&m->leaf, r, weights);
        for (int64_t t = 0; t < tokens; t++) {
            double sum = add ? y[t * stride + r] : 0.0;
            for (int64_t i = 0; i < m->leaf.inputs; i++) sum += (double)weights[i] * x[t].x[i];
            y[t * stride + r] = (float)sum;
        }
    }
}

static void run_linear(tensor *node, int ith, int nth, void *data) {
    const operation *op = data;
    linear *l = op->of;
    plugin *p = l->owner;
    const tensor *input = node->src[1];
    int64_t tokens = input->ne[1], stride = (int64_t)(node->nb[1] / sizeof(float)), own = tokens == 1 ? p->max_tokens + ith : 0;
    if (nth > p->threads) {
        if (ith == 0) fail(p, "more threads than the context was made for", l->name);
        return;
    }
    if (ith == 0) atomic_store(&p->ran, 1), atomic_fetch_add(&p->runs, 1);
    const compot_activation *x = p->x + own, *z[MAX_PAIRS] = {NULL};
    for (int i = 0; i < l->pairs; i++) z[i] = p->z[i] + own;
    if (!op->reuse) {
        if (!op->rounded) {
            x = rounded_for(p->x, p, input->data, input->nb[1], l->inputs, tokens, ith, nth);
            if (tokens > 1) wait_for_all(p, nth);
        }
        int64_t at = 0;
        for (int i = 0; i < l->pairs; i++) {
            multiply(p, &l->dictionaries[i], ith, nth, x, tokens, p->z_raw + at, l->atoms, 0);
            at += l->dictionaries[i].leaf.outputs;
        }
        if (l->pairs) {
            wait_for_all(p, nth);
            at = 0;
            for (int i = 0; i < l->pairs; i++) {
                rounded_for(p->z[i], p, (const char *)(p->z_raw + at), (size_t)l->atoms * sizeof(float),
                            l->codes[i].leaf.inputs, tokens, ith, nth);
                at += l->codes[i].leaf.inputs;
            }
            if (tokens > 1) wait_for_all(p, nth);
        }
    }
    int leaves = l->pairs ? l->pairs : 1;
    for (int i = 0; i < leaves; i++)
        multiply(p, &l->codes[i], ith, nth, l->pairs ? z[i] : x, tokens, node->data, stride, i > 0);
}

static void run_rows(tensor *node, int ith, int nth, void *data) {
    const operation *op = data;
    linear *l = op->of;
    plugin *p = l->owner;
    const int32_t *ids = node->src[1]->data;
    int64_t tokens = node->ne[1];
    if (ith == 0) atomic_store(&p->ran, 1), atomic_fetch_add(&p->runs, 1);
    for (int64_t t = tokens * ith / nth; t < tokens * (ith + 1) / nth; t++) {
        float *target = (float *)(void *)((char *)node->data + (size_t)t * node->nb[1]);
        if (ids[t] < 0 || ids[t] >= l->outputs) {
            memset(target, 0, sizeof(float) * (size_t)l->inputs);
            fail(p, "a token id outside the vocabulary", l->name);
        } else {
            compot_row(&l->codes[0].leaf, ids[t], target);
        }
    }
}

static int compare_names(const void *a, const void *b) { return strncmp(a, b, NAME); }

static linear *find(const plugin *p, const char *name) {
    int low = 0, high = p->count - 1;
    while (low <= high) {
        int middle = (low + high) / 2, order = strncmp(name, p->linears[middle].name, NAME);
        if (order == 0) return &p->linears[middle];
        if (order < 0) high = middle - 1;
        else low = middle + 1;
    }
    return NULL;
}

/* llama.cpp gives this way of loading every optional scale and bias; a node that multiplies with one or adds zero in
 * place changes nothing, and costs a barrier of all threads. What adds ones or multiplies with zeros does. */
static bool is_neutral(const plugin *p, const tensor *node) {
    const tensor *value = node->src[0], *by = node->src[1];
    if ((node->op != p->op_add && node->op != p->op_mul) || !value || !by || node->data != value->data ||
        node->type != TYPE_F32 || value->type != TYPE_F32)
        return false;
    for (int d = 0; d < 4; d++)
        if (node->ne[d] != value->ne[d] || node->nb[d] != value->nb[d]) return false;
    const char *kind = strrchr(by->name, '.');
    if (!kind || strcmp(kind, node->op == p->op_add ? ".bias" : ".scale")) return false;
    return p->neutral_count && bsearch(by->name, p->neutral, (size_t)p->neutral_count, NAME, compare_names);
}

static void replace(tensor *node, const plugin *p, void (*function)(tensor *, int, int, void *), operation *op) {
    custom_params params = {function, -1, op};
    memset(node->op_params, 0, sizeof node->op_params);
    memcpy(node->op_params, &params, sizeof params);
    node->op = p->op_custom;
}

/* llama.cpp's cb_eval: never wants to see a node's data, so the graph is computed in one piece. */
COMPOT_API bool compot_plugin_callback(tensor *node, bool ask, void *data) {
    plugin *p = data;
    if (!ask) return true;
    if (is_neutral(p, node)) {
        node->op = OP_NONE;
        return false;
    }
    if (node->op != p->op_mul_mat && node->op != p->op_get_rows) return false;
    linear *l = node->src[0] ? find(p, node->src[0]->name) : NULL;
    if (!l) return false;
    const tensor *input = node->src[1];
    if (node->op == p->op_get_rows) {
        if (l->pairs || input->type != TYPE_I32 || node->type != TYPE_F32 || node->nb[0] != sizeof(float) ||
            node->ne[0] != l->inputs || node->ne[2] != 1 || node->ne[3] != 1 || input->nb[0] != sizeof(int32_t))
            fail(p, "llama.cpp reads the embedding in a way that is not handled", l->name);
        else replace(node, p, run_rows, &l->fresh);
        return false;
    }
    if (l->bundle == ROWS_ONLY || input->type != TYPE_F32 || node->type != TYPE_F32 || input->nb[0] != sizeof(float) ||
        node->nb[0] != sizeof(float) || input->ne[0] != l->inputs || node->ne[0] != l->outputs || input->ne[2] != 1 ||
        input->ne[3] != 1 || input->nb[1] % sizeof(float) || node->nb[1] % sizeof(float)) {
        fail(p, "llama.cpp multiplies with the matrix in a shape that is not handled", l->name);
        return false;
    }
    if (input->ne[1] > p->max_tokens) {
        fail(p, "more tokens at a time than the context was made for", l->name);
        return false;
    }
    /* A new graph, or a new evaluation: its first question comes after something ran, or repeats a matrix. */
    if (atomic_exchange(&p->ran, 0) || l->asked == p->epoch) {
        p->epoch++;
        p->last_bundle = -1;
        p->last_input = NULL;
    }
    l->asked = p->epoch;
    bool rounded = input == p->last_input, reuse = rounded && l->bundle >= 0 && l->bundle == p->last_bundle;
    p->last_bundle = l->bundle;
    p->last_input = input;
    replace(node, p, run_linear, reuse ? &l->again : rounded ? &l->rounded : &l->fresh);
    return false;
}

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
