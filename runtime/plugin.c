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
#define GIVE_WAY() sched_yield()
#else
#define GIVE_WAY() ((void)0)
#endif

enum { NAME = 64, MAX_PAIRS = 4, MAX_SOURCES = 10, TYPE_F32 = 0, TYPE_I32 = 26 };

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

typedef struct {
    linear *of;
    bool rounded; /* the node before rounded the same input */
    bool reuse;   /* and multiplied it with the same dictionaries */
} operation;

struct linear {
    char name[NAME];
    plugin *owner;
    int pairs;         /* 0: one plain leaf, in codes[0] */
    int32_t bundle;    /* linears with one bundle have the same dictionaries; -1 shares nothing */
    int64_t inputs, outputs, atoms;
    compot_leaf dictionaries[MAX_PAIRS], codes[MAX_PAIRS];
    uint64_t asked;
    operation fresh, rounded, again;
};

struct plugin {
    int op_mul_mat, op_get_rows, op_custom;
    int capacity, count, threads;
    bool exact; /* activations as they are, sums in double: slow, for comparisons */
    int64_t max_tokens, wide, atoms; /* widest input, and most atoms of one linear */
    linear *linears;
    /* scratch, shared by all nodes: they run one after the other */
    compot_activation *x, *z[MAX_PAIRS];
    float *z_raw, *floats;
    int8_t *bytes;
    uint8_t *scratch;
    size_t scratch_size;
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

/* compot_multiply, or the same with nothing rounded: a row's weights as floats, sums in double. */
static void multiply(const plugin *p, const compot_leaf *leaf, int64_t first, int64_t last, const compot_activation *x,
                     int64_t tokens, float *y, int64_t stride, int add, void *scratch) {
    if (!p->exact) {
        compot_multiply(leaf, first, last, x, tokens, y, stride, add, scratch);
        return;
    }
    float *weights = scratch; /* compot_scratch gives 288 bytes for every 64 inputs, and 256 are needed */
    for (int64_t r = first; r < last; r++) {
        compot_row(leaf, r, weights);
        for (int64_t t = 0; t < tokens; t++) {
            double sum = add ? y[t * stride + r] : 0.0;
            for (int64_t i = 0; i < leaf->inputs; i++) sum += (double)weights[i] * x[t].x[i];
            y[t * stride + r] = (float)sum;
        }
    }
}

static void run_linear(tensor *node, int ith, int nth, void *data) {
    const operation *op = data;
    linear *l = op->of;
    plugin *p = l->owner;
    const tensor *input = node->src[1];
    int64_t tokens = input->ne[1], stride = (int64_t)(node->nb[1] / sizeof(float));
    if (nth > p->threads) {
        if (ith == 0) fail(p, "more threads than the context was made for", l->name);
        return;
    }
    void *scratch = p->scratch + (size_t)ith * p->scratch_size;
    if (ith == 0) atomic_store(&p->ran, 1), atomic_fetch_add(&p->runs, 1);
    if (!op->reuse) {
        if (!op->rounded) {
            round_all(input->data, input->nb[1], l->inputs, tokens, p->x, ith, nth);
            wait_for_all(p, nth);
        }
        int64_t at = 0;
        for (int i = 0; i < l->pairs; i++) {
            const compot_leaf *leaf = &l->dictionaries[i];
            multiply(p, leaf, share(leaf->outputs, ith, nth), share(leaf->outputs, ith + 1, nth), p->x, tokens,
                            p->z_raw + at, l->atoms, 0, scratch);
            at += leaf->outputs;
        }
        if (l->pairs) {
            wait_for_all(p, nth);
            at = 0;
            for (int i = 0; i < l->pairs; i++) {
                round_all((const char *)(p->z_raw + at), (size_t)l->atoms * sizeof(float), l->codes[i].inputs, tokens,
                          p->z[i], ith, nth);
                at += l->codes[i].inputs;
            }
            wait_for_all(p, nth);
        }
    }
    int64_t first = share(l->outputs, ith, nth), last = share(l->outputs, ith + 1, nth);
    int leaves = l->pairs ? l->pairs : 1;
    for (int i = 0; i < leaves; i++)
        multiply(p, &l->codes[i], first, last, l->pairs ? p->z[i] : p->x, tokens, node->data, stride, i > 0, scratch);
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
            compot_row(&l->codes[0], ids[t], target);
        }
    }
}

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
    if (input->type != TYPE_F32 || node->type != TYPE_F32 || input->nb[0] != sizeof(float) ||
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
    free(p->linears), free(p->x), free(p->z_raw), free(p->floats), free(p->bytes), free(p->scratch);
    for (int i = 0; i < MAX_PAIRS; i++) free(p->z[i]);
    free(p);
}

COMPOT_API plugin *compot_plugin_new(int op_mul_mat, int op_get_rows, int op_custom, int capacity, int64_t max_tokens,
                                     int threads) {
    if (capacity < 1 || max_tokens < 1 || threads < 1) return NULL;
    plugin *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->linears = calloc((size_t)capacity, sizeof *p->linears);
    if (!p->linears) {
        free(p);
        return NULL;
    }
    p->op_mul_mat = op_mul_mat, p->op_get_rows = op_get_rows, p->op_custom = op_custom;
    p->capacity = capacity, p->max_tokens = max_tokens, p->threads = threads;
    p->epoch = 1, p->last_bundle = -1;
    return p;
}

/* Adds a matrix: leaves are dictionary, codes, dictionary, codes …, or one leaf when pairs is 0.
 * Returns 0, or a number that says what is wrong (compot_check's, or 20 and above). */
COMPOT_API int compot_plugin_add(plugin *p, const char *name, int pairs, const compot_leaf *leaves, int32_t bundle) {
    if (p->count >= p->capacity || pairs < 0 || pairs > MAX_PAIRS || strlen(name) >= NAME) return 20;
    linear *l = &p->linears[p->count];
    memset(l, 0, sizeof *l);
    strcpy(l->name, name);
    l->pairs = pairs, l->bundle = pairs ? bundle : -1;
    for (int i = 0; i < (pairs ? 2 * pairs : 1); i++) {
        int wrong = compot_check(&leaves[i]);
        if (wrong) return wrong;
    }
    if (!pairs) l->codes[0] = leaves[0], l->inputs = leaves[0].inputs, l->outputs = leaves[0].outputs;
    for (int i = 0; i < pairs; i++) {
        l->dictionaries[i] = leaves[2 * i];
        l->codes[i] = leaves[2 * i + 1];
        if (leaves[2 * i].outputs != leaves[2 * i + 1].inputs) return 21;
        if (i && (leaves[2 * i].inputs != l->inputs || leaves[2 * i + 1].outputs != l->outputs)) return 22;
        l->inputs = leaves[2 * i].inputs, l->outputs = leaves[2 * i + 1].outputs;
        l->atoms += leaves[2 * i].outputs;
    }
    if (l->inputs > p->wide) p->wide = l->inputs;
    if (l->atoms > p->atoms) p->atoms = l->atoms;
    p->count++;
    return 0;
}

static int by_name(const void *a, const void *b) { return strncmp(((const linear *)a)->name, ((const linear *)b)->name, NAME); }

/* Floats and bytes of `tokens` activations of n inputs, cut from the buffers. */
static void cut(compot_activation *a, int64_t tokens, int64_t n, float **floats, int8_t **bytes) {
    int64_t units = compot_units(n);
    for (int64_t t = 0; t < tokens; t++) {
        a[t].x = *floats, a[t].scale = *floats + 64 * units, a[t].sum = a[t].scale + units;
        a[t].total = a[t].sum + 2 * units, a[t].q = *bytes;
        *floats += COMPOT_UNIT_FLOATS * units, *bytes += COMPOT_UNIT_BYTES * units;
    }
}

/* After the last add: sorts the names and allocates. Returns 0, or 30 without memory, or 31 for a name twice. */
COMPOT_API int compot_plugin_ready(plugin *p) {
    qsort(p->linears, (size_t)p->count, sizeof *p->linears, by_name);
    int64_t widest[MAX_PAIRS] = {0}, units = compot_units(p->wide);
    int64_t longest = p->wide;
    for (int i = 0; i < p->count; i++) {
        linear *l = &p->linears[i];
        if (i && !by_name(l - 1, l)) return 31;
        l->owner = p;
        l->fresh = (operation){l, false, false}, l->rounded = (operation){l, true, false}, l->again = (operation){l, true, true};
        for (int k = 0; k < l->pairs; k++)
            if (l->codes[k].inputs > widest[k]) widest[k] = l->codes[k].inputs;
    }
    for (int k = 0; k < MAX_PAIRS; k++) {
        units += compot_units(widest[k]);
        if (widest[k] > longest) longest = widest[k];
    }
    size_t tokens = (size_t)p->max_tokens;
    p->scratch_size = (compot_scratch(longest) + 63) & ~(size_t)63;
    p->floats = malloc(tokens * (size_t)units * COMPOT_UNIT_FLOATS * sizeof(float));
    p->bytes = malloc(tokens * (size_t)units * COMPOT_UNIT_BYTES);
    p->z_raw = malloc(tokens * (size_t)(p->atoms ? p->atoms : 1) * sizeof(float));
    p->scratch = malloc((size_t)p->threads * p->scratch_size);
    p->x = calloc(tokens, sizeof *p->x);
    if (!p->floats || !p->bytes || !p->z_raw || !p->scratch || !p->x) return 30;
    float *floats = p->floats;
    int8_t *bytes = p->bytes;
    cut(p->x, p->max_tokens, p->wide, &floats, &bytes);
    for (int k = 0; k < MAX_PAIRS; k++) {
        if (!(p->z[k] = calloc(tokens, sizeof *p->z[k]))) return 30;
        cut(p->z[k], p->max_tokens, widest[k], &floats, &bytes);
    }
    return 0;
}

/* Computes everything in floating point, or as usual; between two evaluations. */
COMPOT_API void compot_plugin_exact(plugin *p, int exact) { p->exact = exact != 0; }

/* What went wrong since the last question, or an empty string. */
COMPOT_API const char *compot_plugin_error(plugin *p) {
    return atomic_exchange(&p->failed, 0) ? p->error : "";
}

/* How many nodes were computed here. */
COMPOT_API int64_t compot_plugin_runs(plugin *p) { return (int64_t)atomic_load(&p->runs); }
