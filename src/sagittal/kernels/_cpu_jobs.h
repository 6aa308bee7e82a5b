/* What the tasks of one call share, and how a task finds its part. Layout: (N, D, H, W, C) dense float32, C a multiple of 16. */

enum { TRANSPOSED = 3, BOX_ROWS = 8, BOX_CHANNELS = 64, WEIGHT_PARTS = 64, TAIL_PARTS = 64, TAIL_PARTIAL_FLOATS = 1 << 21 };

typedef void (*task_fn)(void *arg, int64_t task, int slot);

struct depthwise {
    const float *x, *weight, *bias, *add, *grad;
    float *y, *partial;
    int64_t samples, channels, in[3], out[3], partial_size;
    int kernel_d, kernel;
};

struct box {
    int64_t n, d0, d1, h0, h1, c0, c1, part;
};

struct moments {
    const float *x;
    float *partial;
    int64_t channels, voxels, chunk, chunks;
};

struct tail {
    const float *h, *mean, *scale, *expand, *expand_t, *expand_bias, *contract, *contract_t, *contract_bias, *residual, *grad_y;
    float *y, *grad_a, *partial, *scratch;
    int64_t voxels, channels, hidden, outputs, chunk, parts, partial_size, scratch_size;
    task_fn forward, backward;
};

/* A depthwise convolution whose result's moments are taken on the way. Of `parts` sets of voxels, each some rows of one plane, `partial` holds
 * (2, C) numbers: the mean, and the sum of squared distances from it. */
struct sweep {
    struct depthwise as;
    float *partial, *scratch;
    int64_t group, scratch_size;
    int stream;
};

/* y = residual + contract(gelu(expand((h - mean) * scale))), without what a backward pass needs; the matrices lie in panels. Where `odd` is
 * given, h (2n - 1 voxels) lies behind a front plane of zeros in y (2n) along each axis, and odd (n) is added to each second voxel. */
struct forward {
    const float *h, *mean, *scale, *expand, *expand_bias, *contract, *contract_bias, *residual, *odd;
    float *y, *scratch;
    int64_t samples, voxels, size[3], channels, hidden, outputs, chunk, block, scratch_size;
    int stream;
};

/* y (N, voxels, O) = bias + weight_t (C, O) times each voxel of x (N, C, voxels). */
struct stem {
    const float *x, *weight_t, *bias;
    float *y;
    int64_t voxels, channels, outputs;
    int stream;
};

struct panels {
    const float *weight, *scale;
    float *panels;
    int64_t rows, depth;
};

struct norm_backward {
    const float *h, *mean, *scale_a, *scale_h, *shift;
    float *grad;
    int64_t channels, voxels, chunk, chunks;
};

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }

/* What the next chunk of a task will read and write, fetched from the memory while this one computes. */
struct ahead {
    const float *from[3];
    int64_t lines[3], step;
};

static int64_t lines_of(int64_t rows, int64_t columns) { return divide_up(rows * columns, 16); }

static void fetch(const struct ahead *next, int64_t i) {
    for (int k = 0; k < 3; k++) {
        const int64_t stop = at_most((i + 1) * next->step, next->lines[k]);
        for (int64_t line = i * next->step; line < stop; line++) __builtin_prefetch(next->from[k] + 16 * line, 0, 2);
    }
}

static int64_t channel_blocks(const struct depthwise *job) { return divide_up(job->channels, BOX_CHANNELS); }

static int64_t depthwise_tasks(const struct depthwise *job) {
    return job->samples * divide_up(job->out[0], BOX_ROWS) * divide_up(job->out[1], BOX_ROWS) * channel_blocks(job);
}

static void depthwise_box_of_task(const struct depthwise *job, int64_t task, struct box *box) {
    const int64_t c = task % channel_blocks(job), rest = task / channel_blocks(job), blocks_h = divide_up(job->out[1], BOX_ROWS);
    const int64_t h = rest % blocks_h, nd = rest / blocks_h, blocks_d = divide_up(job->out[0], BOX_ROWS), d = nd % blocks_d;
    box->n = nd / blocks_d;
    box->part = 0;
    box->d0 = d * BOX_ROWS;
    box->d1 = at_most(box->d0 + BOX_ROWS, job->out[0]);
    box->h0 = h * BOX_ROWS;
    box->h1 = at_most(box->h0 + BOX_ROWS, job->out[1]);
    box->c0 = c * BOX_CHANNELS;
    box->c1 = at_most(box->c0 + BOX_CHANNELS, job->channels);
}

enum { SWEEP_PLANES = 32, PANEL = 64, STREAM_FLOATS = 1 << 22, STEM_ROWS = 4080, SWEEP_FLOATS = 1 << 18 };

static int64_t sweep_row(const struct sweep *job) { return divide_up(job->as.out[2], 8) * 8 + job->as.kernel - 1; }

static int64_t sweep_plane(const struct sweep *job) { return (BOX_ROWS + job->as.kernel - 1) * sweep_row(job); }

static int64_t sweep_tasks(const struct sweep *job) {
    return job->as.samples * divide_up(job->as.out[0], SWEEP_PLANES) * divide_up(job->as.out[1], BOX_ROWS) * divide_up(job->as.channels, job->group);
}

static void sweep_box_of_task(const struct sweep *job, int64_t task, struct box *box) {
    const int64_t groups = divide_up(job->as.channels, job->group), c = task % groups, rest = task / groups;
    const int64_t blocks_h = divide_up(job->as.out[1], BOX_ROWS), h = rest % blocks_h, nd = rest / blocks_h;
    const int64_t blocks_d = divide_up(job->as.out[0], SWEEP_PLANES), d = nd % blocks_d;
    box->n = nd / blocks_d;
    box->part = (box->n * job->as.out[0]) * blocks_h + h;
    box->d0 = d * SWEEP_PLANES;
    box->d1 = at_most(box->d0 + SWEEP_PLANES, job->as.out[0]);
    box->h0 = h * BOX_ROWS;
    box->h1 = at_most(box->h0 + BOX_ROWS, job->as.out[1]);
    box->c0 = c * job->group;
    box->c1 = at_most(box->c0 + job->group, job->as.channels);
}

/* Planes of one sample that share a partial sum; a rule of the shape alone, so that the sums do not depend on the threads. */
static int64_t weight_planes(const struct depthwise *job) { return divide_up(job->samples * job->out[0], WEIGHT_PARTS); }

static int64_t weight_parts(const struct depthwise *job) { return job->samples * divide_up(job->out[0], weight_planes(job)); }

static void weight_box_of_task(const struct depthwise *job, int64_t task, struct box *box) {
    const int64_t planes = weight_planes(job), parts = divide_up(job->out[0], planes), c = task % channel_blocks(job);
    box->part = task / channel_blocks(job);
    box->n = box->part / parts;
    box->d0 = box->part % parts * planes;
    box->d1 = at_most(box->d0 + planes, job->out[0]);
    box->h0 = 0;
    box->h1 = job->out[1];
    box->c0 = c * BOX_CHANNELS;
    box->c1 = at_most(box->c0 + BOX_CHANNELS, job->channels);
}

static void tail_rows_of_task(const struct tail *job, int64_t task, int64_t *n, int64_t *start, int64_t *stop) {
    const int64_t rows = divide_up(divide_up(job->voxels, job->parts), job->chunk) * job->chunk, part = task % job->parts;
    *n = task / job->parts;
    *start = at_most(part * rows, job->voxels);
    *stop = at_most(*start + rows, job->voxels);
}

/* Of the chunk after the one at `start`: h, a tensor as wide as the output, and one that is written, as wide as the output (forward) or as h
 * (backward). */
static struct ahead tail_ahead(const struct tail *job, int64_t n, int64_t start, int64_t stop, const float *read, const float *written) {
    const int64_t C = job->channels, O = job->outputs, at = start + job->chunk, wide = written == job->y ? O : C;
    const int64_t rows = at < stop ? at_most(stop - at, job->chunk) : 0, from = n * job->voxels + at;
    struct ahead next = {0};
    next.from[0] = job->h + from * C;
    next.from[1] = read ? read + from * O : NULL;
    next.from[2] = written + from * wide;
    next.lines[0] = lines_of(rows, C);
    next.lines[1] = read ? lines_of(rows, O) : 0;
    next.lines[2] = lines_of(rows, wide);
    next.step = divide_up(C > O ? C : O, 16);
    return next;
}
