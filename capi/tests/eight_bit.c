// 8-bit K and V in host memory, with one factor and with one for each KV head; and factors that are refused.
#include "pat.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { Q_HEADS = 4, KV_HEADS = 2, HEAD_DIM = 64, PAGE_SIZE = 16, ROW_ELEMENTS = Q_HEADS * HEAD_DIM };

static int failures = 0;
static uint16_t q[ROW_ELEMENTS], out[ROW_ELEMENTS];
static uint8_t k[PAGE_SIZE * KV_HEADS * HEAD_DIM], v[sizeof k];
static float lse[Q_HEADS];

static void accepted(PatStatus status) {
    if (status != PAT_STATUS_OK) {
        fprintf(stderr, "%s\n", pat_last_error());
        exit(1);
    }
}

static void refused(PatStatus status, const char *message) {
    if (status == PAT_STATUS_OK || strstr(pat_last_error(), message) == NULL) {
        fprintf(stderr, "expected %s; got status %d, %s\n", message, (int)status, pat_last_error());
        failures++;
    }
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// All values are equal, so that the output is the value, times the factor of its KV head; scores are 64 / 8 times K's.
static void check(const char *what, const float *outputs, float score) {
    for (int i = 0; i < ROW_ELEMENTS; i++) {
        float expected = outputs[i / (ROW_ELEMENTS / KV_HEADS)];
        if (fabsf(from_bf16(out[i]) - expected) > expected / 128) {
            fprintf(stderr, "%s: element %d: got %g, expected %g\n", what, i, from_bf16(out[i]), expected);
            exit(1);
        }
    }
    for (int head = 0; head < Q_HEADS; head++) {
        if (fabsf(lse[head] - (score + logf(9))) > 1e-4f) {
            fprintf(stderr, "%s: log-sum-exp %g, expected %g\n", what, lse[head], score + logf(9));
            exit(1);
        }
    }
}

int main(void) {
    for (int i = 0; i < ROW_ELEMENTS; i++) {
        q[i] = 0x3f80; // 1
    }
    memset(k, 0x30, sizeof k); // 0.5
    memset(v, 0x44, sizeof v); // 3
    PatProblem problem = {.q_heads = Q_HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .dtype = PAT_DTYPE_BF16,
                          .kv_dtype = PAT_DTYPE_E4M3, .page_size = PAGE_SIZE};
    PatPlanner *planner;
    accepted(pat_planner_for_profile(&problem, "h200", NULL, &planner));
    const int32_t page_ids[] = {0}, lengths[] = {9};
    const PatPaddedTables tables = {.page_ids = page_ids, .page_id_count = 1, .row_stride = 1, .lengths = lengths,
                                    .sequence_count = 1, .num_pages = 1};
    PatPlan *plan;
    accepted(pat_planner_plan_padded(planner, &tables, &plan));
    PatTensors tensors;
    accepted(pat_tensors_contiguous(&problem, 1, 1, PAT_LAYOUT_NHD, &tensors));
    if (tensors.k.bytes != sizeof k) {
        fprintf(stderr, "bytes of K: got %llu\n", (unsigned long long)tensors.k.bytes);
        return 1;
    }
    tensors.q.data = q;
    tensors.k.data = k;
    tensors.v.data = v;
    tensors.out.data = out;
    tensors.lse.data = lse;
    accepted(pat_plan_run_host(plan, NULL, &tensors));
    check("without factors", (float[]){3, 3}, 4);
    tensors.k.scale = 0.25f;
    const float of_heads[] = {2, 0.5f}, none[] = {1, -1};
    tensors.v.head_scales = of_heads;
    accepted(pat_plan_run_host(plan, NULL, &tensors));
    check("with factors", (float[]){6, 1.5f}, 1);

    memset(out, 0x55, sizeof out);
    tensors.v.scale = 1;
    refused(pat_plan_run_host(plan, NULL, &tensors), "tensors.v.scale: got 1, expected 0 beside head_scales");
    tensors.v.scale = 0;
    tensors.v.head_scales = none;
    refused(pat_plan_run_host(plan, NULL, &tensors), "v_scale: got -1");
    tensors.v.head_scales = (const float *)out;
    refused(pat_plan_run_host(plan, NULL, &tensors), "tensors.out: got memory of tensors.v.head_scales");
    tensors.v.head_scales = (const float *)((const char *)of_heads + 1);
    refused(pat_plan_run_host(plan, NULL, &tensors), "tensors.v.head_scales: got address");
    tensors.v.head_scales = NULL;
    tensors.k.scale = NAN;
    refused(pat_plan_run_host(plan, NULL, &tensors), "k_scale: got NaN");
    for (int i = 0; i < ROW_ELEMENTS; i++) {
        failures += out[i] != 0x5555;
    }
    pat_plan_free(plan);
    pat_planner_free(planner);
    return failures == 0 ? 0 : 1;
}
