// Decode steps of two layers on CUDA device 0, on an engine's own memory and stream: first launched, then as a graph that serves
// the plans of later steps. Compares every result with that of the CPU. The driver is opened when the program runs, so that
// compiling it needs no CUDA. Ends with status 77 where there is no device.
//
//   cc -Icapi/include capi/examples/device.c -Ltarget/release -lpat_capi -lm -ldl -o device
#include "pat.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { Q_HEADS = 32, KV_HEADS = 8, HEAD_DIM = 128, PAGE_SIZE = 16, NUM_PAGES = 28, ROW_STRIDE = 8, SEQUENCES = 6, LAYERS = 2 };
enum { POOL_ELEMENTS = NUM_PAGES * PAGE_SIZE * KV_HEADS * HEAD_DIM, ROW_ELEMENTS = SEQUENCES * Q_HEADS * HEAD_DIM };
enum { NO_DEVICE = 77, LSE_ELEMENTS = SEQUENCES * Q_HEADS };

// What is used of the driver (cuda.h), with pointers as integers.
typedef unsigned long long Address;
static int (*cuInit)(unsigned);
static int (*cuDevicePrimaryCtxRetain)(void **, int);
static int (*cuCtxSetCurrent)(void *);
static int (*cuMemAlloc)(Address *, size_t);
static int (*cuMemcpyHtoD)(Address, const void *, size_t);
static int (*cuMemcpyDtoH)(void *, Address, size_t);
static int (*cuStreamCreate)(void **, unsigned);
static int (*cuStreamSynchronize)(void *);
static int (*cuStreamBeginCapture)(void *, int);
static int (*cuStreamEndCapture)(void *, void **);
static int (*cuGraphInstantiate)(void **, void *, unsigned long long);
static int (*cuGraphLaunch)(void *, void *);

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void check(PatStatus status) {
    if (status != PAT_STATUS_OK) {
        fail(pat_last_error());
    }
}

static void check_driver(int status, const char *call) {
    if (status != 0) {
        fprintf(stderr, "%s: CUDA error %d\n", call, status);
        exit(1);
    }
}

#define DRIVER(call) check_driver(call, #call)

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "libcuda.so.1 is not there\n");
        exit(NO_DEVICE);
    }
    // A function's address by way of an object's: what POSIX wants of dlsym.
    const struct {
        const char *name;
        void *function;
    } symbols[] = {
        {"cuInit", &cuInit},
        {"cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain},
        {"cuCtxSetCurrent", &cuCtxSetCurrent},
        {"cuMemAlloc_v2", &cuMemAlloc},
        {"cuMemcpyHtoD_v2", &cuMemcpyHtoD},
        {"cuMemcpyDtoH_v2", &cuMemcpyDtoH},
        {"cuStreamCreate", &cuStreamCreate},
        {"cuStreamSynchronize", &cuStreamSynchronize},
        {"cuStreamBeginCapture_v2", &cuStreamBeginCapture},
        {"cuStreamEndCapture", &cuStreamEndCapture},
        {"cuGraphInstantiateWithFlags", &cuGraphInstantiate},
        {"cuGraphLaunch", &cuGraphLaunch},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *address = dlsym(library, symbols[i].name);
        if (address == NULL) {
            fail(symbols[i].name);
        }
        memcpy(symbols[i].function, &address, sizeof address);
    }
    if (cuInit(0) != 0) {
        fprintf(stderr, "the driver finds no device\n");
        exit(NO_DEVICE);
    }
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Numbers between -2 and 2.
static void fill(uint16_t *values, size_t count, uint32_t seed) {
    for (size_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        float value = (float)(seed >> 8) / (1 << 22) - 2.0f;
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        values[i] = (uint16_t)(bits >> 16);
    }
}

static void *to_device(const void *data, size_t bytes) {
    Address address;
    DRIVER(cuMemAlloc(&address, bytes));
    DRIVER(cuMemcpyHtoD(address, data, bytes));
    return (void *)(uintptr_t)address;
}

// A layer's tensors in host and in device memory.
typedef struct {
    PatTensors host, device;
    uint16_t q[ROW_ELEMENTS], k[POOL_ELEMENTS], v[POOL_ELEMENTS], out[ROW_ELEMENTS];
    float lse[LSE_ELEMENTS];
    PatRun *run;
} Layer;

static Layer layers[LAYERS];
static const PatProblem PROBLEM = {.q_heads = Q_HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .dtype = PAT_DTYPE_BF16,
                                   .page_size = PAGE_SIZE};

static void set_up(Layer *layer, uint32_t seed, const PatBuffers *buffers) {
    fill(layer->q, ROW_ELEMENTS, seed);
    fill(layer->k, POOL_ELEMENTS, seed + 1);
    fill(layer->v, POOL_ELEMENTS, seed + 2);
    check(pat_tensors_contiguous(&PROBLEM, NUM_PAGES, SEQUENCES, PAT_LAYOUT_NHD, &layer->host));
    layer->host.q.data = layer->q;
    layer->host.k.data = layer->k;
    layer->host.v.data = layer->v;
    layer->host.out.data = layer->out;
    layer->host.lse.data = layer->lse;
    layer->device = layer->host;
    layer->device.q.data = to_device(layer->q, sizeof layer->q);
    layer->device.k.data = to_device(layer->k, sizeof layer->k);
    layer->device.v.data = to_device(layer->v, sizeof layer->v);
    layer->device.out.data = to_device(layer->out, sizeof layer->out);
    layer->device.lse.data = to_device(layer->lse, sizeof layer->lse);
    check(pat_run_bind(buffers, NULL, &layer->device, &layer->run));
}

// The largest difference between the device's results and the CPU's.
static double compare(Layer *layer, const PatPlan *plan) {
    static uint16_t out[ROW_ELEMENTS];
    static float lse[LSE_ELEMENTS];
    double largest = 0;
    DRIVER(cuMemcpyDtoH(out, (Address)(uintptr_t)layer->device.out.data, sizeof out));
    DRIVER(cuMemcpyDtoH(lse, (Address)(uintptr_t)layer->device.lse.data, sizeof lse));
    check(pat_plan_run_host(plan, NULL, &layer->host));
    for (int i = 0; i < ROW_ELEMENTS; i++) {
        double difference = fabs(from_bf16(out[i]) - from_bf16(layer->out[i]));
        // Two roundings to bfloat16, of numbers below 2.
        if (!(difference <= 2.0 / 128)) {
            fprintf(stderr, "out[%d]: %g on the device, %g on the CPU\n", i, from_bf16(out[i]), from_bf16(layer->out[i]));
            exit(1);
        }
        largest = fmax(largest, difference);
    }
    for (int i = 0; i < LSE_ELEMENTS; i++) {
        // An empty sequence has minus infinity.
        if (!(lse[i] == layer->lse[i] || fabsf(lse[i] - layer->lse[i]) <= 1e-3f)) {
            fprintf(stderr, "lse[%d]: %g on the device, %g on the CPU\n", i, lse[i], layer->lse[i]);
            exit(1);
        }
    }
    return largest;
}

int main(void) {
    open_driver();
    void *context, *stream, *graph, *executable;
    if (cuDevicePrimaryCtxRetain(&context, 0) != 0) {
        fprintf(stderr, "there is no device 0\n");
        return NO_DEVICE;
    }
    DRIVER(cuCtxSetCurrent(context));
    DRIVER(cuStreamCreate(&stream, 1));

    // Once per model.
    const PatPlannerOptions options = {.max_rows = SEQUENCES, .max_pages = SEQUENCES * ROW_STRIDE};
    PatPlanner *planner;
    PatBuffers *buffers;
    check(pat_planner_for_device(&PROBLEM, 0, &options, &planner));
    check(pat_buffers_new(planner, 0, &buffers));
    for (int i = 0; i < LAYERS; i++) {
        set_up(&layers[i], 100 * (uint32_t)(i + 1), buffers);
    }
    if (pat_run_launch(layers[0].run, stream) != PAT_STATUS_PLAN_MISMATCH) {
        fail("a launch before any upload is not refused");
    }

    // Six sequences behind four shared pages; one is empty, two are equal.
    int32_t lengths[SEQUENCES] = {70, 80, 0, 97, 70, 65};
    int32_t page_ids[SEQUENCES * ROW_STRIDE];
    for (int sequence = 0; sequence < SEQUENCES; sequence++) {
        for (int page = 0; page < ROW_STRIDE; page++) {
            int32_t own = 4 + 4 * (sequence == 4 ? 0 : sequence) + page - 4;
            page_ids[sequence * ROW_STRIDE + page] = page < 4 ? page : own < NUM_PAGES ? own : -1;
        }
    }
    const PatPaddedTables tables = {.page_ids = page_ids, .page_id_count = SEQUENCES * ROW_STRIDE, .row_stride = ROW_STRIDE,
                                    .lengths = lengths, .sequence_count = SEQUENCES, .num_pages = NUM_PAGES};
    PatPlan *plan;
    check(pat_planner_plan_padded(planner, &tables, &plan));
    check(pat_buffers_upload(buffers, plan, stream));
    for (int i = 0; i < LAYERS; i++) {
        check(pat_run_launch(layers[i].run, stream));
    }
    DRIVER(cuStreamSynchronize(stream));
    for (int i = 0; i < LAYERS; i++) {
        printf("launched, layer %d: at most %g from the CPU's\n", i, compare(&layers[i], plan));
    }

    // The same launches as a graph, and three more steps of it. 0: no work that could disturb the capture may be enqueued.
    DRIVER(cuStreamBeginCapture(stream, 0));
    for (int i = 0; i < LAYERS; i++) {
        check(pat_run_launch(layers[i].run, stream));
    }
    DRIVER(cuStreamEndCapture(stream, &graph));
    DRIVER(cuGraphInstantiate(&executable, graph, 0));
    for (int step = 1; step <= 3; step++) {
        for (int sequence = 0; sequence < SEQUENCES; sequence++) {
            lengths[sequence] += lengths[sequence] > 0;
        }
        check(pat_planner_advance_padded(planner, plan, &tables, NULL, 0, NULL));
        check(pat_buffers_upload(buffers, plan, stream));
        DRIVER(cuGraphLaunch(executable, stream));
        DRIVER(cuStreamSynchronize(stream));
        for (int i = 0; i < LAYERS; i++) {
            printf("graph, step %d, layer %d: at most %g from the CPU's\n", step, i, compare(&layers[i], plan));
        }
    }

    // q and out elsewhere: here, layer 1's in layer 0's run.
    check(pat_run_launch_at(layers[0].run, layers[1].device.q.data, layers[1].device.out.data, stream));
    DRIVER(cuStreamSynchronize(stream));
    memcpy(layers[1].k, layers[0].k, sizeof layers[1].k);
    memcpy(layers[1].v, layers[0].v, sizeof layers[1].v);
    layers[1].device.lse.data = layers[0].device.lse.data;
    printf("other q and out: at most %g from the CPU's\n", compare(&layers[1], plan));

    // A plan that does not fit stays outside, and the one before serves on.
    const int32_t many[SEQUENCES + 1] = {1, 1, 1, 1, 1, 1, 1};
    PatPaddedTables larger = tables;
    larger.page_id_count = SEQUENCES + 1;
    larger.row_stride = 1;
    larger.lengths = many;
    larger.sequence_count = SEQUENCES + 1;
    PatPlanner *unbounded;
    PatPlan *too_large;
    check(pat_planner_for_device(&PROBLEM, 0, NULL, &unbounded));
    check(pat_planner_plan_padded(unbounded, &larger, &too_large));
    if (pat_buffers_upload(buffers, too_large, stream) != PAT_STATUS_PLAN_MISMATCH) {
        fail("a plan of more rows than max_rows is not refused");
    }
    DRIVER(cuGraphLaunch(executable, stream));
    // In any order; the graph keeps what it uses.
    pat_plan_free(plan);
    pat_plan_free(too_large);
    pat_planner_free(unbounded);
    pat_planner_free(planner);
    pat_buffers_free(buffers);
    for (int i = 0; i < LAYERS; i++) {
        pat_run_free(layers[i].run);
    }
    DRIVER(cuGraphLaunch(executable, stream));
    DRIVER(cuStreamSynchronize(stream));
    return 0;
}
