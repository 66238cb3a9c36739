// What C can get wrong, as far as a library can see it: a status, a message that names the argument, and nothing written.
#include "pat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;

// The call has this status, and its message this beginning.
static void refused(int line, PatStatus got, PatStatus expected, const char *message) {
    if (got != expected || strncmp(pat_last_error(), message, strlen(message)) != 0) {
        fprintf(stderr, "line %d: got status %d, \"%s\"; expected status %d, \"%s\"\n", line, (int)got, pat_last_error(),
                (int)expected, message);
        failures++;
    }
}

static void accepted(int line, PatStatus got) {
    if (got != PAT_STATUS_OK) {
        fprintf(stderr, "line %d: got status %d, \"%s\"; expected success\n", line, (int)got, pat_last_error());
        failures++;
    }
}

#define REFUSED(call, message) refused(__LINE__, call, PAT_STATUS_INVALID_ARGUMENT, message)
#define REFUSED_AS(call, status, message) refused(__LINE__, call, status, message)
#define ACCEPTED(call) accepted(__LINE__, call)

static const PatProblem GOOD = {.q_heads = 4, .kv_heads = 2, .head_dim = 64, .dtype = PAT_DTYPE_F16, .page_size = 16};
// Three sequences of 20, 0 and 33 tokens.
static const int32_t PAGE_IDS[] = {0, 1, -1, -1, -1, -1, 0, 2, 3};
static const int32_t LENGTHS[] = {20, 0, 33};
static const PatPaddedTables TABLES = {.page_ids = PAGE_IDS, .page_id_count = 9, .row_stride = 3, .lengths = LENGTHS,
                                       .sequence_count = 3, .num_pages = 4};

static uint16_t q[3 * 4 * 64], pool[4 * 16 * 2 * 64], out[3 * 4 * 64];
static float lse[3 * 4];

static void problems(void) {
    PatPlanner *const none = (PatPlanner *)(uintptr_t)16;
    PatPlanner *planner = none;
    PatProblem problem = GOOD;
    REFUSED(pat_supports(NULL, 0, NULL, NULL), "problem: got NULL, expected an address");
    REFUSED(pat_planner_for_profile(NULL, "h200", NULL, &planner), "problem: got NULL");
    REFUSED(pat_planner_for_profile(&problem, NULL, NULL, &planner), "profile: got NULL");
    REFUSED(pat_planner_for_profile(&problem, "h200", NULL, NULL), "planner: got NULL");
    REFUSED(pat_planner_for_profile(&problem, "b700", NULL, &planner), "device profile: got b700, expected one of");
    REFUSED(pat_planner_for_profile(&problem, "\xff", NULL, &planner), "profile: got");
    const void *odd = (const char *)&problem + 1;
    REFUSED(pat_planner_for_profile(odd, "h200", NULL, &planner), "problem: got address");
    problem.kv_heads = 0;
    REFUSED(pat_planner_for_profile(&problem, "h200", NULL, &planner), "kv_heads: got 0, expected at least 1");
    problem = GOOD;
    problem.dtype = 77;
    REFUSED(pat_planner_for_profile(&problem, "h200", NULL, &planner), "problem.dtype: got 77, expected PAT_DTYPE_F16");
    problem.dtype = 0;
    REFUSED(pat_supports(&problem, 0, NULL, NULL), "problem.dtype: got 0");
    problem = GOOD;
    problem.head_dim = 72;
    REFUSED_AS(pat_supports(&problem, 0, NULL, NULL), PAT_STATUS_UNSUPPORTED, "head_dim: got 72");
    problem = GOOD;
    problem.softmax_scale = -1;
    REFUSED_AS(pat_supports(&problem, 0, NULL, NULL), PAT_STATUS_UNSUPPORTED, "softmax_scale: got -1");
    const PatKvStrides strides = {.page = 2048, .token = 1, .head = 64};
    REFUSED_AS(pat_supports(&GOOD, 0, NULL, &strides), PAT_STATUS_UNSUPPORTED, "v_strides.token: got 1 elements");
    ACCEPTED(pat_supports(&GOOD, 80, NULL, NULL));

    PatPlannerOptions options = {.mode = 9};
    REFUSED(pat_planner_for_profile(&GOOD, "h200", &options, &planner), "options.mode: got 9");
    options = (PatPlannerOptions){.mode = PAT_MODE_FIXED_CHUNK, .fixed_chunk_tokens = 17};
    REFUSED(pat_planner_for_profile(&GOOD, "h200", &options, &planner), "fixed chunk: got 17");
    options = (PatPlannerOptions){.max_rows = 8};
    REFUSED(pat_planner_for_profile(&GOOD, "h200", &options, &planner), "options.max_pages: got 0");
    options = (PatPlannerOptions){.max_pages = 8};
    REFUSED(pat_planner_for_profile(&GOOD, "h200", &options, &planner), "options.max_rows: got 0");
    if (planner != none) {
        fprintf(stderr, "a refused call has written its result\n");
        failures++;
    }
}

static void batches(PatPlanner *planner) {
    PatPlan *plan = NULL;
    PatPaddedTables tables = TABLES;
    REFUSED(pat_planner_plan_padded(NULL, &tables, &plan), "planner: got NULL");
    REFUSED(pat_planner_plan_padded(planner, NULL, &plan), "tables: got NULL");
    REFUSED(pat_planner_plan_padded(planner, &tables, NULL), "plan: got NULL");
    tables.page_ids = NULL;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "tables.page_ids: got NULL");
    tables = TABLES;
    tables.lengths = NULL;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "tables.lengths: got NULL");
    tables = TABLES;
    tables.page_id_count = 8;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "block_table: got 8 entries, expected at least");
    tables = TABLES;
    tables.row_stride = 2;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "block_tables[2]: got 2 pages of 16 tokens");
    tables.row_stride = SIZE_MAX;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "block_table: got 9 entries");
    tables = TABLES;
    tables.sequence_count = SIZE_MAX / 2;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "tables.lengths: got 9223372036854775807 elements");
    tables = TABLES;
    tables.num_pages = 3;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "block_tables[2][2]: got 3, expected a page id below");
    const int32_t negative[] = {20, -5, 33};
    tables = TABLES;
    tables.lengths = negative;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "lengths[1]: got -5, expected 0 to");
    const int32_t foreign[] = {0, -7, -1, -1, -1, -1, 0, 2, 3};
    tables = TABLES;
    tables.page_ids = foreign;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "block_tables[0][1]: got -7");
    const uint32_t query_tokens[] = {1, 1, 34};
    tables = TABLES;
    tables.query_tokens = query_tokens;
    REFUSED(pat_planner_plan_padded(planner, &tables, &plan), "query_tokens[2]: got 34, expected at most lengths[2] = 33");

    const int32_t indptr[] = {0, 2, 1}, ids[] = {0, 1}, last_page_len[] = {4, 16};
    PatCsrTables csr = {.indptr = indptr, .page_ids = ids, .page_id_count = 2, .last_page_len = last_page_len,
                        .sequence_count = 2, .num_pages = 4};
    REFUSED(pat_planner_plan_csr(planner, &csr, &plan), "indptr[2]: got 1");
    const int32_t beyond[] = {0, 1, 3};
    csr.indptr = beyond;
    REFUSED(pat_planner_plan_csr(planner, &csr, &plan), "indptr[2]: got 3");
    csr.indptr = NULL;
    REFUSED(pat_planner_plan_csr(planner, &csr, &plan), "tables.indptr: got NULL");
    const int32_t right[] = {0, 1, 2}, too_long[] = {4, 17};
    csr.indptr = right;
    csr.last_page_len = too_long;
    REFUSED(pat_planner_plan_csr(planner, &csr, &plan), "last_page_len[1]: got 17");
    csr.last_page_len = last_page_len;
    ACCEPTED(pat_planner_plan_csr(planner, &csr, &plan));
    pat_plan_free(plan);
    // Nothing to decode is a batch, too.
    csr = (PatCsrTables){.indptr = right, .sequence_count = 0};
    ACCEPTED(pat_planner_plan_csr(planner, &csr, &plan));
    pat_plan_free(plan);
    const PatPaddedTables empty = {0};
    ACCEPTED(pat_planner_plan_padded(planner, &empty, &plan));
    pat_plan_free(plan);
}

static void advances(PatPlanner *planner) {
    PatPlan *plan;
    ACCEPTED(pat_planner_plan_padded(planner, &TABLES, &plan));
    PatPlanSummary before, after;
    ACCEPTED(pat_plan_summary(plan, &before));
    const uint32_t changed[] = {3};
    PatPlanChange change = PAT_PLAN_CHANGE_PAGES;
    REFUSED(pat_planner_advance_padded(planner, NULL, &TABLES, NULL, 0, &change), "plan: got NULL");
    refused(__LINE__, pat_planner_advance_padded(planner, plan, &TABLES, changed, 1, &change), PAT_STATUS_INVALID_ARGUMENT,
            "changed_rows");
    const int32_t negative[] = {20, 0, -1};
    PatPaddedTables tables = TABLES;
    tables.lengths = negative;
    REFUSED(pat_planner_advance_padded(planner, plan, &tables, NULL, 0, &change), "lengths[2]: got -1");
    PatProblem problem = GOOD;
    problem.q_heads = 8;
    PatPlanner *other;
    ACCEPTED(pat_planner_for_profile(&problem, "h200", NULL, &other));
    REFUSED_AS(pat_planner_advance_padded(other, plan, &TABLES, NULL, 0, &change), PAT_STATUS_PLAN_MISMATCH,
               "plan does not fit the planner");
    pat_planner_free(other);
    ACCEPTED(pat_plan_summary(plan, &after));
    if (change != PAT_PLAN_CHANGE_PAGES || memcmp(&before, &after, sizeof before) != 0) {
        fprintf(stderr, "a refused advance has changed something\n");
        failures++;
    }
    ACCEPTED(pat_planner_advance_padded(planner, plan, &TABLES, changed, 0, &change));
    if (change != PAT_PLAN_CHANGE_NOTHING) {
        fprintf(stderr, "the same batch: got change %d\n", (int)change);
        failures++;
    }
    REFUSED(pat_plan_summary(NULL, &after), "plan: got NULL");
    REFUSED(pat_plan_summary(plan, NULL), "summary: got NULL");
    pat_plan_free(plan);
}

static PatTensors good_tensors(void) {
    PatTensors tensors;
    ACCEPTED(pat_tensors_contiguous(&GOOD, 4, 3, PAT_LAYOUT_NHD, &tensors));
    tensors.q.data = q;
    tensors.k.data = pool;
    tensors.v.data = pool;
    tensors.out.data = out;
    tensors.lse.data = lse;
    return tensors;
}

static void host_runs(PatPlanner *planner) {
    PatPlan *plan;
    ACCEPTED(pat_planner_plan_padded(planner, &TABLES, &plan));
    PatTensors tensors = good_tensors();
    REFUSED(pat_tensors_contiguous(&GOOD, 4, 3, 7, &tensors), "layout: got 7");
    REFUSED(pat_tensors_contiguous(&GOOD, 4, 3, PAT_LAYOUT_HND, NULL), "tensors: got NULL");
    memset(out, 0x55, sizeof out);
    memset(lse, 0x55, sizeof lse);
    REFUSED(pat_plan_run_host(NULL, NULL, &tensors), "plan: got NULL");
    REFUSED(pat_plan_run_host(plan, NULL, NULL), "tensors: got NULL");
    tensors.q.data = NULL;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.q: got NULL");
    tensors = good_tensors();
    tensors.out.data = NULL;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.out: got NULL");
    tensors = good_tensors();
    tensors.k.data = (const char *)pool + 1;
    tensors.k.bytes -= 2;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.k: got address");
    tensors = good_tensors();
    tensors.q.bytes = sizeof q - 1;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "q: got 767 elements, expected at least 768");
    tensors = good_tensors();
    tensors.v.bytes = 0;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "v: got 0 elements");
    tensors = good_tensors();
    tensors.k.bytes = UINT64_MAX;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.");
    tensors = good_tensors();
    tensors.lse.bytes = 4;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "lse: got 1 elements");
    tensors = good_tensors();
    tensors.q.strides.head = -64;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "q_strides.head: got -64 elements");
    tensors = good_tensors();
    tensors.out.strides.row = 0;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "out_strides.sequence: got 0 elements");
    tensors = good_tensors();
    tensors.k.strides.token = 65;
    REFUSED_AS(pat_plan_run_host(plan, NULL, &tensors), PAT_STATUS_UNSUPPORTED, "k_strides.token: got 65 elements");
    tensors = good_tensors();
    tensors.rows = 2;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.rows: got 2, expected at least the plan's 3");
    tensors = good_tensors();
    tensors.num_pages = 5;
    REFUSED_AS(pat_plan_run_host(plan, NULL, &tensors), PAT_STATUS_PLAN_MISMATCH, "plan does not fit tensors.num_pages");
    tensors = good_tensors();
    tensors.out.data = q;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.out: got memory of tensors.q");
    tensors = good_tensors();
    tensors.lse.data = out;
    REFUSED(pat_plan_run_host(plan, NULL, &tensors), "tensors.lse: got memory of tensors.out");
    tensors = good_tensors();
    // A plan of another shape, of other pages, of another type.
    PatProblem problem = GOOD;
    problem.kv_heads = 4;
    REFUSED_AS(pat_plan_run_host(plan, &problem, &tensors), PAT_STATUS_PLAN_MISMATCH, "plan does not fit the shape");
    problem = GOOD;
    problem.page_size = 32;
    REFUSED_AS(pat_plan_run_host(plan, &problem, &tensors), PAT_STATUS_PLAN_MISMATCH, "plan does not fit the page_size");
    problem = GOOD;
    problem.dtype = PAT_DTYPE_BF16;
    REFUSED_AS(pat_plan_run_host(plan, &problem, &tensors), PAT_STATUS_PLAN_MISMATCH, "plan does not fit");
    for (size_t i = 0; i < sizeof out / sizeof out[0]; i++) {
        failures += out[i] != 0x5555;
    }
    uint32_t bits;
    for (size_t i = 0; i < sizeof lse / sizeof lse[0]; i++) {
        memcpy(&bits, &lse[i], sizeof bits);
        failures += bits != 0x55555555;
    }

    problem = GOOD;
    problem.softmax_scale = 0.5f;
    ACCEPTED(pat_plan_run_host(plan, &problem, &tensors));
    tensors.lse.data = NULL;
    ACCEPTED(pat_plan_run_host(plan, NULL, &tensors));
    pat_plan_free(plan);
}

static void devices(PatPlanner *planner) {
    PatBuffers *buffers = NULL;
    PatRun *run = NULL;
    PatPlanner *bounded;
    const PatPlannerOptions options = {.max_rows = 8, .max_pages = 64};
    ACCEPTED(pat_planner_for_profile(&GOOD, "h200", &options, &bounded));
    const PatTensors tensors = good_tensors();
    REFUSED(pat_buffers_new(NULL, 0, &buffers), "planner: got NULL");
    REFUSED(pat_buffers_new(planner, 0, &buffers), "planner: got one without bounds");
    REFUSED(pat_buffers_new(bounded, 0, NULL), "buffers: got NULL");
    REFUSED(pat_buffers_upload(NULL, NULL, NULL), "buffers: got NULL");
    REFUSED(pat_run_bind(NULL, NULL, &tensors, &run), "buffers: got NULL");
    REFUSED(pat_run_launch(NULL, NULL), "run: got NULL");
    REFUSED(pat_run_launch_at(NULL, NULL, NULL, NULL), "run: got NULL");
    // No machine has so many.
    PatStatus status = pat_buffers_new(bounded, 100000, &buffers);
    if (status != PAT_STATUS_CUDA_UNAVAILABLE && status != PAT_STATUS_INVALID_ARGUMENT) {
        fprintf(stderr, "device 100000: got status %d\n", (int)status);
        failures++;
    }
    PatPlan *plan = NULL;
    const int32_t lengths[9] = {1, 1, 1, 1, 1, 1, 1, 1, 1}, ids[9] = {0};
    const PatPaddedTables tables = {.page_ids = ids, .page_id_count = 9, .row_stride = 1, .lengths = lengths,
                                    .sequence_count = 9, .num_pages = 1};
    REFUSED(pat_planner_plan_padded(bounded, &tables, &plan), "lengths: got those of 9 rows, expected at most");
    pat_planner_free(bounded);
}

int main(void) {
    PatPlanner *planner;
    ACCEPTED(pat_planner_for_profile(&GOOD, "h200", NULL, &planner));
    problems();
    batches(planner);
    advances(planner);
    host_runs(planner);
    devices(planner);
    pat_planner_free(planner);
    pat_planner_free(NULL);
    pat_plan_free(NULL);
    pat_buffers_free(NULL);
    pat_run_free(NULL);
    return failures == 0 ? 0 : 1;
}
