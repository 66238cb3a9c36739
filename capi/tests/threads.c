// Four threads share a planner and plans: each plans, advances, runs and fails on its own, and all get the same numbers.
#include "pat.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { THREADS = 4, ROUNDS = 50, ELEMENTS = 2 * 4 * 64 };

static PatPlanner *planner;
static PatPlan *shared;
static uint16_t q[ELEMENTS], pool[4 * 16 * 2 * 64], expected[ELEMENTS];
static const PatProblem PROBLEM = {.q_heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = PAT_DTYPE_F16, .page_size = 16};
static const int32_t PAGE_IDS[] = {0, 1, 2, 0, 1, 3}, LENGTHS[] = {40, 45};
static const PatPaddedTables TABLES = {.page_ids = PAGE_IDS, .page_id_count = 6, .row_stride = 3, .lengths = LENGTHS,
                                       .sequence_count = 2, .num_pages = 4};

static int run(const PatPlan *plan, uint16_t *out) {
    PatTensors tensors;
    if (pat_tensors_contiguous(&PROBLEM, 4, 2, PAT_LAYOUT_NHD, &tensors) != PAT_STATUS_OK) {
        return 1;
    }
    tensors.q.data = q;
    tensors.k.data = pool;
    tensors.v.data = pool;
    tensors.out.data = out;
    return pat_plan_run_host(plan, NULL, &tensors) != PAT_STATUS_OK;
}

static void *work(void *argument) {
    const int number = *(const int *)argument;
    char message[64];
    snprintf(message, sizeof message, "layout: got %d", number + 10);
    for (int round = 0; round < ROUNDS; round++) {
        PatPlan *own;
        uint16_t out[ELEMENTS];
        PatTensors tensors;
        // The message is this thread's, whatever the others do.
        if (pat_tensors_contiguous(&PROBLEM, 4, 2, (PatLayout)(number + 10), &tensors) != PAT_STATUS_INVALID_ARGUMENT
            || pat_planner_plan_padded(planner, &TABLES, &own) != PAT_STATUS_OK
            || pat_planner_advance_padded(planner, shared, &TABLES, NULL, 0, NULL) != PAT_STATUS_OK
            || run(own, out) != 0 || memcmp(out, expected, sizeof out) != 0 || run(shared, out) != 0
            || memcmp(out, expected, sizeof out) != 0 || strncmp(pat_last_error(), message, strlen(message)) != 0) {
            fprintf(stderr, "thread %d, round %d: \"%s\"\n", number, round, pat_last_error());
            return argument;
        }
        pat_plan_free(own);
    }
    return NULL;
}

int main(void) {
    for (int i = 0; i < (int)(sizeof pool / sizeof pool[0]); i++) {
        // Halves between 1 and 2.
        pool[i] = (uint16_t)(0x3c00 + i * 37 % 1024);
        q[i % ELEMENTS] = pool[i];
    }
    if (pat_planner_for_profile(&PROBLEM, "h200", NULL, &planner) != PAT_STATUS_OK
        || pat_planner_plan_padded(planner, &TABLES, &shared) != PAT_STATUS_OK || run(shared, expected) != 0) {
        fprintf(stderr, "%s\n", pat_last_error());
        return 1;
    }
    pthread_t threads[THREADS];
    int numbers[THREADS], failed = 0;
    for (int i = 0; i < THREADS; i++) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, work, &numbers[i]) != 0) {
            return 1;
        }
    }
    for (int i = 0; i < THREADS; i++) {
        void *result;
        pthread_join(threads[i], &result);
        failed += result != NULL;
    }
    pat_plan_free(shared);
    pat_planner_free(planner);
    return failed;
}
