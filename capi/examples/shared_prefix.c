// One layer of two decode steps on the CPU, for two sequences that share their first two pages. Prints the plan in numbers and
// the results, and fails where they are not the right ones.
//
//   cargo build --release --package pat-capi
//   cc -Icapi/include capi/examples/shared_prefix.c -Ltarget/release -lpat_capi -lm -o shared_prefix
//   LD_LIBRARY_PATH=target/release ./shared_prefix
#include "pat.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { Q_HEADS = 8, KV_HEADS = 2, HEAD_DIM = 64, PAGE_SIZE = 16, NUM_PAGES = 4, SEQUENCES = 2, ROW_STRIDE = 4 };
enum { PAGE_ELEMENTS = PAGE_SIZE * KV_HEADS * HEAD_DIM, ROW_ELEMENTS = Q_HEADS * HEAD_DIM };

static void check(PatStatus status) {
    if (status != PAT_STATUS_OK) {
        fprintf(stderr, "%s\n", pat_last_error());
        exit(1);
    }
}

static void expect_near(const char *what, double got, double expected, double tolerance) {
    if (!(fabs(got - expected) <= tolerance)) {
        fprintf(stderr, "%s: got %g, expected %g +- %g\n", what, got, expected, tolerance);
        exit(1);
    }
}

// bfloat16 is the upper half of a float. The numbers here lose nothing.
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float from_bf16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

// Every element of Q and K is 1 and every element of V the number of its page: each token counts the same, and the output is the
// average of the page numbers.
static uint16_t q[SEQUENCES * ROW_ELEMENTS], k[NUM_PAGES * PAGE_ELEMENTS], v[NUM_PAGES * PAGE_ELEMENTS];
static uint16_t out[SEQUENCES * ROW_ELEMENTS];
static float lse[SEQUENCES * Q_HEADS];

static void run_and_check(const PatPlan *plan, const PatTensors *tensors, const int32_t *lengths) {
    check(pat_plan_run_host(plan, NULL, tensors));
    for (int sequence = 0; sequence < SEQUENCES; sequence++) {
        // Pages 0 and 1 are full; the rest is in page 2 + sequence.
        int tail = lengths[sequence] - 2 * PAGE_SIZE;
        double average = (PAGE_SIZE * 1.0 + tail * (2.0 + sequence)) / lengths[sequence];
        printf("sequence %d, %d tokens: out %.4f, lse %.4f\n", sequence, lengths[sequence],
               from_bf16(out[sequence * ROW_ELEMENTS]), lse[sequence * Q_HEADS]);
        for (int i = 0; i < ROW_ELEMENTS; i++) {
            expect_near("out", from_bf16(out[sequence * ROW_ELEMENTS + i]), average, average / 128);
        }
        for (int head = 0; head < Q_HEADS; head++) {
            double score = HEAD_DIM / sqrt(HEAD_DIM);
            expect_near("lse", lse[sequence * Q_HEADS + head], score + log(lengths[sequence]), 1e-4);
        }
    }
}

int main(void) {
    if (pat_abi_version() != PAT_ABI_VERSION) {
        fprintf(stderr, "pat.h has version %d, the library %u\n", PAT_ABI_VERSION, pat_abi_version());
        return 1;
    }
    for (int i = 0; i < NUM_PAGES * PAGE_ELEMENTS; i++) {
        k[i] = to_bf16(1);
        v[i] = to_bf16((float)(i / PAGE_ELEMENTS));
    }
    for (int i = 0; i < SEQUENCES * ROW_ELEMENTS; i++) {
        q[i] = to_bf16(1);
    }

    // Once per model.
    PatProblem problem = {.q_heads = Q_HEADS, .kv_heads = KV_HEADS, .head_dim = HEAD_DIM, .dtype = PAT_DTYPE_BF16,
                          .page_size = PAGE_SIZE};
    check(pat_supports(&problem, 90, NULL, NULL));
    PatPlanner *planner;
    check(pat_planner_for_profile(&problem, "h100-sxm", NULL, &planner));
    PatTensors tensors;
    check(pat_tensors_contiguous(&problem, NUM_PAGES, SEQUENCES, PAT_LAYOUT_NHD, &tensors));
    tensors.q.data = q;
    tensors.k.data = k;
    tensors.v.data = v;
    tensors.out.data = out;
    tensors.lse.data = lse;

    // Once per decode step. What stands behind the pages that a length needs is not looked at.
    int32_t lengths[SEQUENCES] = {40, 45};
    const int32_t page_ids[SEQUENCES * ROW_STRIDE] = {0, 1, 2, -1, 0, 1, 3, -1};
    PatPaddedTables tables = {.page_ids = page_ids, .page_id_count = SEQUENCES * ROW_STRIDE, .row_stride = ROW_STRIDE,
                              .lengths = lengths, .sequence_count = SEQUENCES, .num_pages = NUM_PAGES};
    PatPlan *plan;
    check(pat_planner_plan_padded(planner, &tables, &plan));
    PatPlanSummary summary;
    check(pat_plan_summary(plan, &summary));
    printf("%u sequences, sharing factor %.2f, %u work items, %.1f us predicted\n", summary.rows, summary.sharing_factor,
           summary.items, summary.predicted_us);
    expect_near("sharing factor", summary.sharing_factor, 85.0 / 53.0, 1e-9);

    // Once per layer.
    run_and_check(plan, &tensors, lengths);

    // The next step: each sequence has one token more.
    lengths[0]++;
    lengths[1]++;
    PatPlanChange change;
    check(pat_planner_advance_padded(planner, plan, &tables, NULL, 0, &change));
    if (change != PAT_PLAN_CHANGE_LENGTHS) {
        fprintf(stderr, "change: got %d, expected %d\n", (int)change, PAT_PLAN_CHANGE_LENGTHS);
        return 1;
    }
    run_and_check(plan, &tensors, lengths);

    pat_plan_free(plan);
    pat_planner_free(planner);
    return 0;
}
