// pat-rs: prefix-aware decode attention over a paged KV cache. `cargo xtask c-header` writes this file from the crate pat-capi.
//
// Once per decode step an engine plans its batch, or advances the plan of the step before; once per layer it runs the plan. The
// plan can run in host memory (pat_plan_run_host) or on a CUDA device: pat_buffers_new and pat_run_bind once per model,
// pat_buffers_upload once per step, pat_run_launch once per layer and step. capi/examples/shared_prefix.c is a program.
//
// Functions return PAT_STATUS_OK, or why not: pat_last_error then names the argument, what came and what is accepted. A call that
// refuses an argument has written and launched nothing, and no panic or exception leaves the library. What no
// library can see from the outside is the caller's to keep:
//
// Rule 1, arguments. A pointer is NULL where that is allowed, or points to what the parameter says, for as long as the call: so
// many elements as the count beside it, initialised where they are read, and changed by nobody meanwhile.
// Rule 2, objects. What a function gave (PatPlanner, PatPlan, PatBuffers, PatRun) is given back once, by the function that ends
// in _free, when nobody uses it any more. Objects may be given back in any order.
// Rule 3, tensors. Their memory is there, as many bytes as they say. That in host memory is used during the call alone. That in
// device memory is reachable from the device's primary context; it stays until all work that was enqueued with it has finished,
// and as long as graphs hold that work. Nobody else writes what a run reads, or uses what it writes, meanwhile.
// Rule 4, streams. A stream is a CUstream of the device's primary context (NULL: the default one), and lives as long as buffers
// that were uploaded on it are used. Replays of a graph are ordered with uploads into the buffers of its runs: on one stream.
//
// Threads: any function may be called from any thread, with any objects. Calls that change an object (planning, advancing,
// uploading) wait for others that use it. pat_last_error is the calling thread's own.


#ifndef PAT_H
#define PAT_H

#include <stddef.h>
#include <stdint.h>

// The version of this header. A program compares it with `pat_abi_version`, once, before it calls anything else.
#define PAT_ABI_VERSION 2

// What came of a call. Numbers stay what they are.
enum PatStatus
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Done.
    PAT_STATUS_OK = 0,
    // An argument has a value that is not accepted.
    PAT_STATUS_INVALID_ARGUMENT = 1,
    // A plan was used with something it was not made for.
    PAT_STATUS_PLAN_MISMATCH = 2,
    // There is no usable CUDA device or driver.
    PAT_STATUS_CUDA_UNAVAILABLE = 3,
    // A call of the CUDA driver failed.
    PAT_STATUS_CUDA = 4,
    // No kernel can compute the problem.
    PAT_STATUS_UNSUPPORTED = 5,
    // A fault of this library: please report it.
    PAT_STATUS_INTERNAL = 6,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum PatStatus PatStatus;
#else
typedef int32_t PatStatus;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// What `pat_planner_advance_padded` and its neighbour have changed, from least to most.
enum PatPlanChange
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Nothing: the plan need not be uploaded again.
    PAT_PLAN_CHANGE_NOTHING = 0,
    // Lengths, within the last pages.
    PAT_PLAN_CHANGE_LENGTHS = 1,
    // Private pages.
    PAT_PLAN_CHANGE_PAGES = 2,
    // Rows, or who shares what.
    PAT_PLAN_CHANGE_FOREST = 3,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum PatPlanChange PatPlanChange;
#else
typedef int32_t PatPlanChange;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// Memory on a device for the plans of one planner and for their partial results.
typedef struct PatBuffers PatBuffers;

// Who is served together in one decode step, for all layers.
typedef struct PatPlan PatPlan;

// Makes plans for one problem on one device; keeps its scratch memory from step to step.
typedef struct PatPlanner PatPlanner;

// One layer's run, checked once. It keeps the buffers' memory.
typedef struct PatRun PatRun;

// An element type: one of `PAT_DTYPE_F16` and the others.
typedef uint32_t PatDtype;

// What is computed. In fields that have a usual value, 0 stands for it.
typedef struct {
    // Query heads: a multiple of `kv_heads`.
    uint32_t q_heads;
    // KV heads.
    uint32_t kv_heads;
    // Elements per head of Q and K.
    uint32_t head_dim;
    // Elements per head of V and O; 0: `head_dim`.
    uint32_t v_head_dim;
    // Element type of Q.
    PatDtype dtype;
    // Element type of K and V; 0: `dtype`.
    PatDtype kv_dtype;
    // Element type of O; 0: `dtype`.
    PatDtype out_dtype;
    // Tokens per page.
    uint32_t page_size;
    // Factor of the scores; 0: 1 / sqrt(head_dim).
    float softmax_scale;
    // Scores are capped by soft_cap * tanh(score / soft_cap); 0: not.
    float soft_cap;
    // Only so many tokens of a sequence are attended to, its last ones; 0: all.
    uint32_t window;
} PatProblem;

// Strides of a pool, K or V, in elements: 0 or positive multiples of 16 bytes. The elements of a head are contiguous.
typedef struct {
    // Elements between pages.
    int64_t page;
    // Elements between tokens of a page.
    int64_t token;
    // Elements between KV heads.
    int64_t head;
} PatKvStrides;

// How a batch is tiled: one of `PAT_MODE_AUTO` and the others.
typedef uint32_t PatMode;

// How to plan. All 0 is the usual way.
typedef struct {
    // How batches are tiled.
    PatMode mode;
    // Tokens of a chunk in `PAT_MODE_FIXED_CHUNK`: a positive multiple of the page size.
    uint32_t fixed_chunk_tokens;
    // Most rows of a batch (query tokens, where sequences have several). Plans that run on a device need it; 0: no bound.
    uint32_t max_rows;
    // Most pages of a batch, shared ones counted for each row; 0 exactly where `max_rows` is 0.
    uint32_t max_pages;
} PatPlannerOptions;

// Block tables as a padded matrix. Row `b` names the pages of sequence `b` in its first `ceil(lengths[b] / page_size)`
// entries; what stands behind them may be anything.
typedef struct {
    // Page ids, `[sequence_count, row_stride]`.
    const int32_t *page_ids;
    // Entries of `page_ids`: at least sequence_count * row_stride.
    size_t page_id_count;
    // Entries from one row to the next.
    size_t row_stride;
    // Tokens of each sequence, `[sequence_count]`, the one being decoded included. Of length 0 (a padding row) the output is 0
    // and the log-sum-exp minus infinity.
    const int32_t *lengths;
    // Sequences.
    size_t sequence_count;
    // Query tokens of each sequence, `[sequence_count]`: its last tokens, each of which sees the tokens up to itself and has a
    // row of Q, O and LSE; those of the first sequence come first. NULL: one each.
    const uint32_t *query_tokens;
    // Pages in the pools of K and V.
    uint32_t num_pages;
} PatPaddedTables;

// Block tables in compressed rows: sequence `b` has the pages `page_ids[indptr[b]]` up to `page_ids[indptr[b + 1]]`.
typedef struct {
    // Where the rows begin, `[sequence_count + 1]`: ascending from 0.
    const int32_t *indptr;
    // Page ids of all rows.
    const int32_t *page_ids;
    // Entries of `page_ids`: at least the last of `indptr`.
    size_t page_id_count;
    // Tokens in each sequence's last page, `[sequence_count]`: 1 to page_size; not looked at where a sequence has no page.
    const int32_t *last_page_len;
    // Sequences.
    size_t sequence_count;
    // As in `PatPaddedTables`.
    const uint32_t *query_tokens;
    // Pages in the pools of K and V.
    uint32_t num_pages;
} PatCsrTables;

// A plan in numbers. KV bytes are K and V over all KV heads; predictions are for the profile that was planned with.
typedef struct {
    // Rows of the batch, empty ones included.
    uint32_t rows;
    // Rows that the merge kernel writes.
    uint32_t merge_rows;
    // Work items; each runs once per KV head.
    uint32_t items;
    // Largest number of partial results of a row.
    uint32_t max_splits;
    // How often the average KV byte would be read without sharing.
    double sharing_factor;
    // KV bytes of distinct pages.
    uint64_t unique_kv_bytes;
    // KV bytes that the plan reads.
    uint64_t planned_kv_bytes;
    // KV bytes that reading without sharing would take.
    uint64_t flat_kv_bytes;
    // Bytes of partial results.
    uint64_t partial_bytes;
    // Bytes of an upload.
    uint64_t upload_bytes;
    // The largest load of a multiprocessor's place over the mean load; 1 is even.
    double imbalance;
    // Predicted time of a run in microseconds.
    double predicted_us;
    // A number that no two results of planning in this process share.
    uint64_t generation;
} PatPlanSummary;

// Strides of Q, O or LSE, in elements. Those of Q and O are 0 or positive multiples of 16 bytes.
typedef struct {
    // Elements between rows.
    int64_t row;
    // Elements between heads.
    int64_t head;
} PatRowStrides;

// Memory of Q.
typedef struct {
    // Its first element.
    const void *data;
    // Bytes from there on that may be read.
    uint64_t bytes;
    // Where elements lie.
    PatRowStrides strides;
} PatRows;

// Memory of a pool, K or V.
typedef struct {
    // Its first element. V may lie inside K's rows.
    const void *data;
    // Bytes from there on that may be read.
    uint64_t bytes;
    // Where elements lie.
    PatKvStrides strides;
    // What the elements are multiplied with, where they have 8 bits; 0: 1.
    float scale;
    // Instead of `scale` a factor for each KV head, `[kv_heads]`, in host or device memory as the tensors; NULL: none.
    const float *head_scales;
} PatPool;

// Memory of O or LSE. Elements between the rows keep their values.
typedef struct {
    // Its first element.
    void *data;
    // Bytes from there on that may be written.
    uint64_t bytes;
    // Where elements lie.
    PatRowStrides strides;
} PatOutRows;

// The tensors of a run, all in host memory or all in device memory (`(void *)` of a `CUdeviceptr`). Addresses in device memory
// are multiples of 16 bytes (of LSE: 4), those in host memory of the element size. Outputs share no memory with anything else.
// `pat_tensors_contiguous` fills in sizes and strides.
typedef struct {
    // Rows of Q, O and LSE: at least the plan's, on a device at least `max_rows`. Rows behind the plan's are left alone.
    uint32_t rows;
    // Pages of K and V: the plan's.
    uint32_t num_pages;
    // `[rows, q_heads, head_dim]`.
    PatRows q;
    // `[num_pages, page_size, kv_heads, head_dim]`, in any order of the dimensions but the last.
    PatPool k;
    // Likewise, of v_head_dim elements.
    PatPool v;
    // `[rows, q_heads, v_head_dim]`.
    PatOutRows out;
    // Natural log-sum-exp of the scores, 32-bit floats `[rows, q_heads]`; with `data` NULL it is not written.
    PatOutRows lse;
} PatTensors;

// The order of the dimensions of K and V: one of `PAT_LAYOUT_NHD` and `PAT_LAYOUT_HND`.
typedef uint32_t PatLayout;

// IEEE 754 binary16.
#define PAT_DTYPE_F16 1

// bfloat16.
#define PAT_DTYPE_BF16 2

// 8 bits, 4 of exponent and 3 of fraction.
#define PAT_DTYPE_E4M3 3

// 8 bits, 5 of exponent and 2 of fraction.
#define PAT_DTYPE_E5M2 4

// What the cost model predicts to be fastest.
#define PAT_MODE_AUTO 0

// No sharing: every sequence reads its own K and V.
#define PAT_MODE_FLAT 1

// As many sequences together as a tile has rows, no work item with pages of more than one prefix node.
#define PAT_MODE_PER_NODE 2

// As many sequences together as a tile has rows, along their whole path.
#define PAT_MODE_PACKED 3

// K and V cut every `fixed_chunk_tokens` tokens, and sharing of whole chunks alone: a sequence's bits do not depend on the rest of
// the batch.
#define PAT_MODE_FIXED_CHUNK 4

// `[pages, page_size, kv_heads, head_dim]`.
#define PAT_LAYOUT_NHD 0

// `[pages, kv_heads, page_size, head_dim]`.
#define PAT_LAYOUT_HND 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// `PAT_ABI_VERSION` of the library that is there: structs and functions are those of a header with the same number.
uint32_t pat_abi_version(void);

// The library's version, as "0.1.0".
const char *pat_version(void);

// What the calling thread's last failed call said: the argument, what came and what is accepted. Never NULL; stays until the
// thread's next failed call.
const char *pat_last_error(void);

// Whether some kernel can compute a problem, on a device of this compute capability (major * 10 + minor; 0: any) and with pools
// of these strides (each may be NULL: contiguous ones). Asks no device. PAT_STATUS_UNSUPPORTED says no, `pat_last_error` why.
PatStatus pat_supports(const PatProblem *problem,
                       uint32_t compute_capability,
                       const PatKvStrides *k_strides,
                       const PatKvStrides *v_strides);

// A planner for a device that is known by name ("h100-sxm", "h200", "a100-80", or the driver's name of it). Needs no GPU.
// `options` may be NULL. Give it back with `pat_planner_free`.
PatStatus pat_planner_for_profile(const PatProblem *problem,
                                  const char *profile,
                                  const PatPlannerOptions *options,
                                  PatPlanner **planner);

// A planner for CUDA device `ordinal` of this process. Otherwise as `pat_planner_for_profile`.
PatStatus pat_planner_for_device(const PatProblem *problem,
                                 uint32_t ordinal,
                                 const PatPlannerOptions *options,
                                 PatPlanner **planner);

// Gives a planner back. NULL is allowed. Its plans and buffers stay what they are.
void pat_planner_free(PatPlanner *planner);

// Plans a batch. Give the plan back with `pat_plan_free`.
PatStatus pat_planner_plan_padded(PatPlanner *planner, const PatPaddedTables *tables, PatPlan **plan);

// Plans a batch. Give the plan back with `pat_plan_free`.
PatStatus pat_planner_plan_csr(PatPlanner *planner, const PatCsrTables *tables, PatPlan **plan);

// Makes `plan` the plan of the next decode step, predicted to be about as fast as planning the batch from scratch; with fixed
// chunks the two are equal. With many sequences it takes little time where `plan` is the one that the planner made last.
// `changed_rows` names the rows whose table entries *that were in use before* may differ (a row that only grew is not among
// them); NULL: all entries are compared, as with `query_tokens`.
// `change` may be NULL. Where the call fails, the plan is as before.
PatStatus pat_planner_advance_padded(PatPlanner *planner,
                                     PatPlan *plan,
                                     const PatPaddedTables *tables,
                                     const uint32_t *changed_rows,
                                     size_t changed_row_count,
                                     PatPlanChange *change);

// As `pat_planner_advance_padded`.
PatStatus pat_planner_advance_csr(PatPlanner *planner,
                                  PatPlan *plan,
                                  const PatCsrTables *tables,
                                  const uint32_t *changed_rows,
                                  size_t changed_row_count,
                                  PatPlanChange *change);

// Writes what the plan is, in numbers.
PatStatus pat_plan_summary(const PatPlan *plan, PatPlanSummary *summary);

// Executes the plan on tensors in host memory, on all cores: the same work items and merge as on a device. `problem` may name
// another `softmax_scale` than the plan's; NULL: the plan's. Where the call fails, nothing is written.
PatStatus pat_plan_run_host(const PatPlan *plan, const PatProblem *problem, const PatTensors *tensors);

// Gives a plan back. NULL is allowed. What was uploaded of it stays.
void pat_plan_free(PatPlan *plan);

// Writes the sizes and strides of contiguous tensors of a problem: Q, O and LSE of `rows` rows, K and V of `num_pages` pages.
// All addresses become NULL: set them then, that of LSE where it is wanted.
PatStatus pat_tensors_contiguous(const PatProblem *problem,
                                 uint32_t num_pages,
                                 uint32_t rows,
                                 PatLayout layout,
                                 PatTensors *tensors);

// Allocates, on CUDA device `ordinal`, memory for the plans of a planner whose options have `max_rows` and `max_pages`, and for
// their partial results, and compiles the kernels that they may use. Runs that may overlap need buffers each. Give it back with
// `pat_buffers_free`.
PatStatus pat_buffers_new(const PatPlanner *planner, uint32_t ordinal, PatBuffers **buffers);

// Makes `plan` the one that later launches use: one asynchronous copy on `stream` (a `CUstream`; NULL: the default stream).
// Once per decode step. Where a plan does not fit, the former one stays. Between the replays of a graph that holds runs, upload
// on the stream that the graph is launched on.
PatStatus pat_buffers_upload(PatBuffers *buffers, const PatPlan *plan, void *stream);

// Gives buffers back. NULL is allowed. Runs that were bound to them keep the memory.
void pat_buffers_free(PatBuffers *buffers);

// Checks a layer's tensors in device memory, once, for every plan that is uploaded into the buffers. `problem` may name another
// `softmax_scale` than the planner's; NULL: the planner's. Give the run back with `pat_run_free`.
PatStatus pat_run_bind(const PatBuffers *buffers, const PatProblem *problem, const PatTensors *tensors, PatRun **run);

// Enqueues the run with the plan that was uploaded last on `stream`. Allocates nothing and waits for nothing. A stream that is
// captured takes it: the graph then keeps the buffers' memory, and its replays use the plan that is there by then.
PatStatus pat_run_launch(const PatRun *run, void *stream);

// As `pat_run_launch`, with Q and O at other addresses, of the sizes and strides that the run was bound with.
PatStatus pat_run_launch_at(const PatRun *run, const void *q, void *out, void *stream);

// Gives a run back. NULL is allowed. What it has enqueued goes on.
void pat_run_free(PatRun *run);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PAT_H */
