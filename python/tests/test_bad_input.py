"""Bad input raises ValueError or TypeError that names the argument, and writes nothing."""

import re

import numpy
import pytest
import torch
from support import SHAPE, caches, queries, random_forest

import prefix_attn as pa

BATCH = random_forest(2)
ROWS = len(BATCH.lengths)


def call(planner, **changes):
    """One run with everything right but `changes`; the output must be as it was if it raises."""
    plan = planner.plan(BATCH.block_tables, BATCH.lengths, 16, BATCH.num_pages)
    k, v = caches(BATCH)
    arguments = dict(plan=plan, q=queries(ROWS), k_cache=k, v_cache=v)
    arguments |= dict(out=torch.full((ROWS, 8, 64), 7.0, dtype=torch.float16), lse=torch.full((ROWS, 8), 7.0))
    arguments |= {name: change(arguments) if callable(change) else change for name, change in changes.items()}
    try:
        return pa.run(**arguments)
    except Exception:
        for name in ("out", "lse"):
            if isinstance(arguments[name], torch.Tensor) and arguments[name].device.type == "cpu":
                assert (arguments[name].float() == 7).all(), "something was written"
        raise


def expanded(out):
    return out[:1].expand(ROWS, 8, 64)


RUNS = [
    ("q", TypeError, "float32", dict(q=queries(ROWS).float())),
    ("q", TypeError, "bfloat16", dict(q=queries(ROWS).bfloat16())),
    ("k_cache", TypeError, "bfloat16", dict(k_cache=lambda a: a["k_cache"].bfloat16())),
    ("v_cache", TypeError, "int32", dict(v_cache=lambda a: a["v_cache"].int())),
    ("out", TypeError, "float32", dict(out=torch.full((ROWS, 8, 64), 7.0))),
    ("lse", TypeError, "float16", dict(lse=torch.full((ROWS, 8), 7.0, dtype=torch.float16))),
    ("q", ValueError, "[rows, 8, 64]", dict(q=queries(ROWS)[:, :4])),
    ("q", ValueError, "rows", dict(q=queries(ROWS)[:-1])),
    ("q", ValueError, "[rows, 8, 64]", dict(q=queries(ROWS)[0])),
    ("q", ValueError, "at most 4", dict(q=queries(ROWS)[None, None, None])),
    ("out", ValueError, "[rows, 8, 64]", dict(out=torch.full((ROWS, 8, 32), 7.0, dtype=torch.float16))),
    ("lse", ValueError, "[rows, 8]", dict(lse=torch.full((ROWS, 4), 7.0))),
    ("k_cache", ValueError, "pages", dict(k_cache=lambda a: a["k_cache"][:1, :8])),
    ("k_cache", ValueError, "plan's", dict(k_cache=lambda a: a["k_cache"][: BATCH.num_pages - 1])),
    ("v_cache", ValueError, "(HND)", dict(kv_layout="HND", k_cache=lambda a: a["k_cache"].transpose(1, 2))),
    ("q", ValueError, "contiguous last", dict(q=queries(ROWS).transpose(1, 2).contiguous().transpose(1, 2))),
    ("k_cache", ValueError, "contiguous last", dict(k_cache=lambda a: torch.cat([a["k_cache"]] * 2, -1)[..., ::2])),
    ("q", ValueError, "multiples of 8", dict(q=torch.zeros(ROWS, 8, 68, dtype=torch.float16)[..., :64])),
    ("out", ValueError, "overlap", dict(out=lambda a: expanded(a["out"]))),
    ("out", ValueError, "memory of its own", dict(out=lambda a: a["q"].fill_(7))),
    ("out", ValueError, "memory of its own", dict(out=lambda a: a["k_cache"].fill_(7).view(-1)[: ROWS * 512].view(ROWS, 8, 64))),
    ("q", ValueError, "requires_grad", dict(q=queries(ROWS).requires_grad_())),
    ("k_cache", ValueError, "requires_grad", dict(k_cache=lambda a: torch.nn.Parameter(a["k_cache"]))),
    ("q", ValueError, "meta", dict(q=torch.empty((ROWS, 8, 64), dtype=torch.float16, device="meta"))),
    ("q", TypeError, "list", dict(q=[1.0, 2.0])),
    ("plan", TypeError, "NoneType", dict(plan=None)),
    ("scale", ValueError, "NaN", dict(scale=float("nan"))),
    ("scale", ValueError, "-1", dict(scale=-1.0)),
    ("scale", TypeError, "str", dict(scale="half")),
    ("softcap", ValueError, "got 0", dict(softcap=0.0)),
    ("softcap", ValueError, "inf", dict(softcap=float("inf"))),
    ("softcap", TypeError, "str", dict(softcap="none")),
    ("sinks", TypeError, "float16", dict(sinks=torch.zeros(8, dtype=torch.float16))),
    ("sinks", TypeError, "list", dict(sinks=[0.0] * 8)),
    ("sinks", ValueError, "[8]", dict(sinks=torch.zeros(4))),
    ("sinks", ValueError, "[8]", dict(sinks=torch.zeros(8, 1))),
    ("sinks", ValueError, "contiguous", dict(sinks=torch.zeros(16)[::2])),
    ("sinks", ValueError, "requires_grad", dict(sinks=torch.nn.Parameter(torch.zeros(8)))),
    ("sinks", ValueError, "meta", dict(sinks=torch.zeros(8, device="meta"))),
    ("lse", ValueError, "memory of sinks", dict(sinks=lambda a: a["lse"].view(-1)[:8])),
    ("kv_layout", ValueError, "NDH", dict(kv_layout="NDH")),
    ("stream", ValueError, "CPU", dict(stream=7)),
    ("out", ValueError, "memory for the output", dict(q=queries(ROWS).numpy(), out=None)),
    ("out", ValueError, "None", dict(q=queries(ROWS).numpy(), out=None, lse=None, return_lse=True)),
]


@pytest.mark.parametrize("argument, error, text, changes", RUNS, ids=[f"{r[0]}-{i}" for i, r in enumerate(RUNS)])
def test_a_run_refuses(planner, argument, error, text, changes):
    with pytest.raises(error) as raised:
        call(planner, **changes)
    assert str(raised.value).startswith(argument) and text in str(raised.value)


def test_a_read_only_output_is_refused(planner):
    out = numpy.full((ROWS, 8, 64), 7, numpy.float16)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: got read-only memory"):
        call(planner, out=out)


def test_an_unaligned_tensor_is_refused(planner):
    """safetensors may hand out tensors whose address is odd."""
    raw = torch.zeros(ROWS * 8 * 64 * 2 + 1, dtype=torch.uint8)
    q = torch.from_numpy(numpy.frombuffer(raw.numpy()[1:].data, dtype=numpy.float16).reshape(ROWS, 8, 64))
    with pytest.raises(ValueError, match="q: got address"):
        call(planner, q=q)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "out", "lse", "sinks"])
@pytest.mark.parametrize("bytes_left", [0, 2, 28])
def test_a_tensor_beyond_its_storage_is_refused(planner, name, bytes_left):
    """torch lets a storage become smaller than the tensors in it."""
    with pytest.raises(ValueError, match=f"^{name}: got"):
        pa.run(**shrunk(planner, name, bytes_left))


def shrunk(planner, name, bytes_left):
    plan = planner.plan(BATCH.block_tables, BATCH.lengths, 16, BATCH.num_pages)
    k, v = caches(BATCH)
    arguments = dict(q=queries(ROWS), k_cache=k, v_cache=v, out=torch.zeros(ROWS, 8, 64, dtype=torch.float16))
    arguments |= dict(lse=torch.zeros(ROWS, 8), sinks=torch.zeros(8))
    arguments[name].untyped_storage().resize_(bytes_left)
    return dict(plan=plan, **arguments)


def test_a_cuda_plan_refuses_cpu_tensors_and_the_reverse():
    shape = pa.AttentionShape(**SHAPE, dtype=torch.float16)
    with pytest.raises((pa.CudaUnavailable, ValueError)):
        pa.Planner(shape, device="cuda:99")
    profile = pa.Planner(shape, device=pa.DeviceProfile.named("h200"))
    assert profile.device is None and call(profile).shape == (ROWS, 8, 64)
    with pytest.raises(ValueError, match="q: got a tensor on meta"):
        call(profile, q=torch.empty((ROWS, 8, 64), dtype=torch.float16, device="meta"))


T32 = torch.int32
PLANS = [
    ("lengths[1]", ValueError, "-1", dict(lengths=[16, -1])),
    ("lengths[0]", ValueError, "-3", dict(lengths=torch.tensor([-3, 16], dtype=T32))),
    ("lengths", TypeError, "int64", dict(lengths=torch.tensor([16, 16]))),
    ("lengths", TypeError, "float32", dict(lengths=torch.tensor([16.0, 16.0]))),
    ("lengths[1]", TypeError, "str", dict(lengths=[16, "16"])),
    ("lengths", ValueError, "one dimension", dict(lengths=torch.zeros((2, 1), dtype=T32))),
    ("lengths", TypeError, "int", dict(lengths=16)),
    ("block_tables", ValueError, "one per length", dict(lengths=[16])),
    ("block_tables[1]", ValueError, "at least 3", dict(lengths=[16, 33])),
    ("block_tables[0][1]", ValueError, "below num_pages = 8", dict(block_tables=[[0, 8], [1, 2]])),
    ("block_tables[0][0]", ValueError, "-1", dict(block_tables=[[-1, 1], [1, 2]])),
    ("block_tables[0][0]", ValueError, "-1", dict(block_tables=torch.tensor([[-1, 1], [1, 2]], dtype=T32))),
    ("block_tables[0][0]", TypeError, "float", dict(block_tables=[[0.5, 1], [1, 2]])),
    ("block_tables", TypeError, "int64", dict(block_tables=torch.tensor([[0, 1], [1, 2]]))),
    ("block_tables", TypeError, "uint8", dict(block_tables=numpy.zeros((2, 2), numpy.uint8))),
    ("block_tables", ValueError, "shape [4]", dict(block_tables=torch.zeros(4, dtype=T32))),
    ("block_tables", TypeError, "dict", dict(block_tables={})),
    ("block_tables", TypeError, "tuple of 3", dict(block_tables=([0], [1], [2]))),
    ("block_tables", TypeError, "tuple of tuples", dict(block_tables=((0, 1, 2), (3, 4, 5)), lengths=[16, 16])),
    ("block_tables[0]", ValueError, "first entry of 0", dict(block_tables=([1, 2, 3], [0, 1, 2]))),
    ("block_tables[0][1]", ValueError, "number of ids", dict(block_tables=([0, 9, 9], [0, 1, 2]))),
    ("block_tables[0][2]", ValueError, "2 to", dict(block_tables=([0, 2, 1], [0, 1, 2]))),
    ("page_size", ValueError, "got 0", dict(page_size=0)),
    ("page_size", ValueError, "got -1, expected 1 to 2^32 - 1", dict(page_size=-1)),
    ("page_size", ValueError, "got 4294967296, expected 1 to 2^32 - 1", dict(page_size=1 << 32)),
    ("num_pages", ValueError, "got -1, expected 0 to 2^32 - 1", dict(num_pages=-1)),
    ("num_pages", ValueError, f"got {1 << 80}, expected 0 to 2^32 - 1", dict(num_pages=1 << 80)),
    ("lengths[1]", ValueError, f"got {1 << 80}, expected an integer of at most 64 bits", dict(lengths=[16, 1 << 80])),
    ("block_tables[0][1]", ValueError, f"got {-1 << 80}, expected an integer of", dict(block_tables=[[0, -1 << 80], [0, 1]])),
    ("query_tokens", ValueError, "got -1, expected 1 to", dict(query_tokens=-1)),
    ("query_tokens", ValueError, "got 0, expected at least 1", dict(query_tokens=0)),
]


@pytest.mark.parametrize("argument, error, text, changes", PLANS, ids=[f"{p[0]}-{i}" for i, p in enumerate(PLANS)])
@pytest.mark.parametrize("background", [False, True], ids=["plan", "plan_async"])
def test_planning_refuses(planner, argument, error, text, changes, background):
    arguments = dict(block_tables=[[0, 1], [0, 2]], lengths=[32, 20], page_size=16, num_pages=8) | changes
    with pytest.raises(error) as raised:
        planner.plan_async(**arguments).result() if background else planner.plan(**arguments)
    assert text in str(raised.value) and str(raised.value).startswith(argument)


OBJECTS = [
    ("head_dim", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 63, "float16"), "cpu")),
    ("kv_heads", ValueError, lambda: pa.AttentionShape(8, 0, 64, "float16")),
    ("q_heads", ValueError, lambda: pa.AttentionShape(7, 2, 64, "float16")),
    ("dtype", ValueError, lambda: pa.AttentionShape(8, 2, 64, torch.float32)),
    ("device", ValueError, lambda: pa.DeviceProfile.detect("tpu")),
    ("device", ValueError, lambda: pa.calibrate("cpu")),
    ("device", TypeError, lambda: pa.DeviceProfile.detect(3.5)),
    ("device profile", ValueError, lambda: pa.DeviceProfile.named("b1000")),
    ("text", ValueError, lambda: pa.DeviceProfile.from_json("{}")),
    ("max_items", ValueError, lambda: pa.Capacity(8, 64, pa.DeviceProfile.named("h200"), max_items=4)),
    ("mode", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", mode="best")),
    ("mode", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", mode="fixed-chunk:0")),
    ("window", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", window=0)),
    ("chunk", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", chunk=0)),
    ("chunk", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", window=8, chunk=8)),
    ("chunk", ValueError, lambda: pa.supports(pa.AttentionShape(8, 2, 64, "float16"), 16, window=8, chunk=8)),
    ("softcap", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", softcap=-1.0)),
    ("variants", ValueError, lambda: pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu", variants=["mma7"])),
    ("planner", ValueError, lambda: pa.PlanBuffers(pa.Planner(pa.AttentionShape(8, 2, 64, "float16"), "cpu"), 16, 8)),
]


SHAPE_64 = pa.AttentionShape(8, 2, 64, "float16")
IN_WORDS = [
    (lambda: pa.AttentionShape(8, 2, 64, "float16", value_head_dim=0), "value_head_dim: got 0, expected 1 to 65535"),
    (lambda: pa.AttentionShape(8, 2, 1 << 80, "float16"), f"head_dim: got {1 << 80}, expected 1 to 2^32 - 1"),
    (lambda: pa.Planner(pa.AttentionShape(8, 2, 192, "float16"), "cpu"), "value_head_dim: got 192, expected 128"),
    (lambda: pa.Planner(SHAPE_64, "cpu", softcap=1e-45), "softcap: got "),
    (
        lambda: pa.Planner(pa.AttentionShape(8, 2, 128, "float16"), "cpu", variants=["wgmma128"], softcap=3.0),
        "variants: got wgmma128, expected some of mma16, mma32, mma64, mma128, wgmma64 (wgmma128: softcap: got 3, expected none)",
    ),
    (lambda: pa.Planner(SHAPE_64, "cpu", window=0), "window: got 0, expected 1 or more"),
    (lambda: pa.Planner(SHAPE_64, "cpu", window=-1), "window: got -1, expected 1 to 2^32 - 1"),
    (lambda: pa.Planner(SHAPE_64, "cpu", chunk=1 << 32), "chunk: got 4294967296, expected 1 to 2^32 - 1"),
    (lambda: pa.supports(SHAPE_64, -1), "page_size: got -1, expected 1 to 2^32 - 1"),
    (lambda: pa.supports(SHAPE_64, 16, query_tokens=-1), "query_tokens: got -1, expected 1 to 2^32 - 1"),
    (lambda: pa.supports(SHAPE_64, 16, value_head_dim=-1), "value_head_dim: got -1, expected 1 to 2^32 - 1"),
    (lambda: pa.supports(SHAPE_64, 16, window=-1 << 70), f"window: got {-1 << 70}, expected 1 to 2^32 - 1"),
    (lambda: pa.Workspace(-1, "cpu"), "bytes: got -1, expected 0 to 2^64 - 1"),
    (lambda: pa.Workspace(1 << 64, "cpu"), f"bytes: got {1 << 64}, expected 0 to 2^64 - 1"),
    (lambda: pa.PlanBuffers(with_capacity(), -1, 8), "page_size: got -1, expected 1 to 2^32 - 1"),
    (lambda: pa.PlanBuffers(with_capacity(), 16, -8), "num_pages: got -8, expected 0 to 2^32 - 1"),
    (lambda: pa.PlanBuffers(with_capacity(), 16, 8).upload(None, stream=-1), "stream: got -1, expected 0 to 2^64 - 1"),
    (lambda: pa.Capacity(-1, 16, pa.DeviceProfile.named("h200")), "max_sequences: got -1, expected 0 to 2^32 - 1"),
]


def with_capacity():
    return pa.Planner(SHAPE_64, "cpu", capacity=pa.Capacity(4, 64, "cpu"))


@pytest.mark.parametrize("make, text", IN_WORDS, ids=[str(i) for i in range(len(IN_WORDS))])
def test_errors_say_what_came_and_what_is_accepted(make, text):
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert str(raised.value).startswith(text)


class Asked:
    """Raises ``error`` when it is asked for ``attribute``."""

    def __init__(self, attribute, error):
        self.attribute, self.error = attribute, error

    def __getattr__(self, name):
        raise self.error if name == self.attribute else AttributeError(name)


TAKEN = {
    "page_size": lambda planner, value: planner.plan([[0]], [5], value, 1),
    "lengths[0]": lambda planner, value: planner.plan([[0]], [value], 16, 1),
    "softcap": lambda _, value: pa.Planner(SHAPE_64, "cpu", softcap=value),
    "k_scale": lambda planner, value: call(planner, k_scale=value),
}


@pytest.mark.parametrize("attribute", ["dtype", "ndim"])
@pytest.mark.parametrize("argument", TAKEN)
def test_what_objects_raise_when_they_are_asked_what_they_are(planner, argument, attribute):
    for error in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            TAKEN[argument](planner, Asked(attribute, error))
    cause = ValueError("no")
    with pytest.raises(TypeError, match=f"^{re.escape(argument)}: got Asked, expected a") as raised:
        TAKEN[argument](planner, Asked(attribute, cause))
    assert raised.value.__cause__ is cause


class Clears:
    """Clears a list when it is asked for its number, 0."""

    def __init__(self, entries):
        self.entries = entries

    def __index__(self):
        self.entries.clear()
        return 0


def test_lists_that_become_shorter_while_they_are_read_are_refused_by_name(planner):
    row, lengths = [], []
    row += [Clears(row), 1]
    with pytest.raises(ValueError, match=r"^block_tables\[0\]\[1\]: got nothing, expected the entry that was there before"):
        planner.plan([row], [20], 16, 4)
    lengths += [Clears(lengths), 1]
    with pytest.raises(ValueError, match=r"^lengths\[1\]: got nothing, expected the entry that was there before"):
        planner.plan([[0], [1]], lengths, 16, 4)


def test_messages_have_the_names_of_the_interface(planner):
    other = pa.Planner(pa.AttentionShape(4, 2, 64, "float16"), "cpu").plan([[0]], [5], 16, 4)
    with pytest.raises(ValueError, match=r'^plan: got one for AttentionShape\(.*dtype="float16"\), expected one for Att.*'):
        planner.advance(other, [[0]], [6])
    buffers = pa.PlanBuffers(with_capacity(), 16, 4)
    with pytest.raises(ValueError, match=r"^plan: got one for AttentionShape\(.*\), page_size 16, .*expected AttentionShape\("):
        buffers.upload(other)


def test_streams_below_0_are_refused_by_name(planner):
    with pytest.raises(ValueError, match="^stream: got -1, expected 0 to"):
        call(planner, stream=-1)
    rows, cache = torch.zeros(1, 2, 64, dtype=torch.float16), torch.zeros(1, 16, 2, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="^stream: got -7, expected 0 to"):
        pa.append_kv(rows, rows, cache, cache.clone(), torch.zeros(1, dtype=torch.int64), stream=-7)
    with pytest.raises(ValueError, match="^stream: got -7, expected 0 to"):
        pa.merge_states(rows, torch.zeros(1, 2), rows, torch.zeros(1, 2), stream=-7)


def test_supports_says_the_arguments_name():
    assert pa.supports(pa.AttentionShape(8, 2, 192, "float16"), 16) == "value_head_dim: got 192, expected 128"
    assert pa.supports(SHAPE_64, 16, softcap=0.0).startswith("softcap: got 0")
    assert pa.supports(SHAPE_64, 0) == "page_size: got 0, expected 1 to 65536"


@pytest.mark.parametrize("argument, error, make", OBJECTS, ids=[o[0] + str(i) for i, o in enumerate(OBJECTS)])
def test_objects_are_not_made_of(argument, error, make):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value).startswith(argument)


def test_the_negative_of_memory_is_refused(planner):
    negative = torch._neg_view(queries(ROWS))
    with pytest.raises(ValueError, match="^q: got a tensor that is the negative of its memory"):
        call(planner, q=negative)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "out", "lse"])
def test_tensors_without_memory_of_their_own_are_refused_by_name(planner, name):
    plan = planner.plan(BATCH.block_tables, BATCH.lengths, 16, BATCH.num_pages)
    k, v = caches(BATCH)
    given = dict(q=queries(ROWS), k_cache=k, v_cache=v, out=queries(ROWS), lse=torch.ones((ROWS, 8)))
    given[name] = given[name].to_sparse()
    with pytest.raises(TypeError, match=f"^{name}: got a torch.sparse_coo tensor without memory") as error:
        pa.run(plan, **given)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize("argument", ["block_tables", "lengths"])
def test_arrays_that_dlpack_cannot_describe_are_refused_by_name(planner, argument):
    given = {"block_tables": numpy.array([[0]], numpy.int32), "lengths": numpy.array([5], numpy.int32)}
    given[argument] = given[argument].astype(">i4")
    with pytest.raises(TypeError, match=f"^{argument}: got ndarray of what DLPack cannot describe"):
        planner.plan(given["block_tables"], given["lengths"], 16, 1)


def test_a_cap_above_all_floats_is_refused_by_name():
    with pytest.raises(ValueError, match="^softcap: got a number above all floating point ones"):
        pa.supports(SHAPE_64, 16, softcap=10**400)


def test_query_rows_that_see_too_many_pages_are_refused(planner):
    with pytest.raises(ValueError, match="^query_tokens: got 50000 rows with 5000000000 pages in all"):
        planner.plan([[0] * 10**5], [16 * 10**5], 16, 1, query_tokens=5 * 10**4)


def test_a_cap_that_the_plans_kernel_has_not_is_refused_on_the_cpu_too():
    profile = pa.DeviceProfile.named("h100-sxm")
    planner = pa.Planner(pa.AttentionShape(**SHAPE, dtype="float16"), profile, variants=["wgmma128"])
    with pytest.raises(ValueError, match="wgmma128, which has no kernels with them"):
        call(planner, softcap=5.0)


@pytest.mark.parametrize("wrong", [1.5, "16", None, [16]])
def test_what_is_no_integer_is_refused_by_name(planner, wrong):
    got = type(wrong).__name__
    with pytest.raises(TypeError, match=f"^page_size: got {got}, expected an integer$"):
        planner.plan([[0]], [5], wrong, 1)
    with pytest.raises(TypeError, match=f"^q_heads: got {got}, expected an integer$"):
        pa.AttentionShape(wrong, 2, 64, "float16")
