"""What no argument may be, of every kind: errors name the argument, are TypeError or ValueError, and come before anything is read."""

import ctypes
import itertools

import numpy
import pytest
import torch
from support import SHAPE

import prefix_attn as pa

HALF = torch.float16
SHAPE_64 = pa.AttentionShape(**SHAPE, dtype="float16")


class Raises:
    """An object whose number cannot be had."""

    def __index__(self):
        raise KeyError("index")

    def __float__(self):
        raise KeyError("float")


class NoNumber:
    def __index__(self):
        return "16"


class Huge:
    def __index__(self):
        return 1 << 90


NO_INTEGERS = {
    "a tensor of one element": (lambda: torch.tensor([16]), "Tensor of 1 dimension"),
    "an array of one element": (lambda: numpy.array([[16]]), "ndarray of 2 dimensions"),
    "a tensor of a float": (lambda: torch.tensor(16.0), "Tensor"),
    "a float": (lambda: 16.0, "float"),
    "a class": (lambda: int, "the class int"),
    "one that raises": (Raises, "Raises"),
    "one that gives text": (NoNumber, "NoNumber"),
    "text": (lambda: "16", "str"),
    "nothing": (lambda: None, "NoneType"),
    "a truth value": (lambda: True, "bool"),
    "numpy's truth value": (lambda: numpy.True_, "bool"),
    "a tensor of a truth value": (lambda: torch.tensor(True), "Tensor of bool"),
    "an array of a truth value": (lambda: numpy.array(True), "ndarray of bool"),
}
TABLE = numpy.zeros((2, 1), numpy.int32)
INTEGER_ARGUMENTS = {
    "page_size": lambda planner, value: planner.plan([[0]], [5], value, 1),
    "num_pages": lambda planner, value: planner.plan_async([[0]], [5], 16, value),
    "lengths[0]": lambda planner, value: planner.plan([[0]], [value], 16, 1),
    "block_tables[0][0]": lambda planner, value: planner.plan([[value]], [5], 16, 1),
    "block_tables[0][1]": lambda planner, value: planner.plan(([0, value], [0]), [5], 16, 1),
    "query_tokens[0]": lambda planner, value: planner.plan([[0]], [5], 16, 1, query_tokens=[value]),
    "table_rows[0]": lambda planner, value: planner.plan(TABLE, [5], 16, 1, table_rows=[value]),
    "q_heads": lambda planner, value: pa.AttentionShape(value, 2, 64, HALF),
    "bytes": lambda planner, value: pa.Workspace(value, "cpu"),
    "max_sequences": lambda planner, value: pa.Capacity(value, 16, "cpu"),
    "page_size of supports": lambda planner, value: pa.supports(SHAPE_64, value),
}


@pytest.mark.parametrize("what", NO_INTEGERS)
@pytest.mark.parametrize("argument", INTEGER_ARGUMENTS)
def test_what_is_no_integer_is_refused_by_name(planner, argument, what):
    make, described = NO_INTEGERS[what]
    with pytest.raises(TypeError) as raised:
        INTEGER_ARGUMENTS[argument](planner, make())
    name = argument.split(" ")[0]
    assert str(raised.value).startswith(f"{name}: got {described}, expected an integer")
    if what == "one that raises":
        assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("value", [numpy.int64(16), numpy.array(16), torch.tensor(16), 16])
def test_integers_without_dimensions_are_taken(planner, value):
    assert planner.plan([[0]], [5], value, 1).page_size == 16
    assert planner.plan([[0]], [value], value, 1, query_tokens=value).sequence_count == 16


def test_an_integer_of_any_size_is_shown(planner):
    with pytest.raises(ValueError, match=f"^page_size: got {1 << 90}, expected 1 to"):
        planner.plan([[0]], [5], Huge(), 1)
    with pytest.raises(ValueError, match=rf"^lengths\[0\]: got {1 << 90}, expected an integer of at most 64 bits"):
        planner.plan([[0]], [Huge()], 16, 1)


@pytest.mark.parametrize("value", [torch.tensor([2]), torch.tensor([[2]], dtype=torch.int32), 2.0, "2", int, Raises(), {}])
def test_query_tokens_are_a_number_or_one_for_each(planner, value):
    with pytest.raises((TypeError, ValueError), match="^query_tokens: got "):
        planner.plan([[0]], [5], 16, 1, query_tokens=value)


def test_one_element_is_one_sequences_number(planner):
    """Of two sequences it is one too few; as a number it would be for both."""
    one = torch.tensor([2], dtype=torch.int32)
    assert planner.plan([[0]], [5], 16, 1, query_tokens=one).sequence_count == 2
    with pytest.raises(ValueError, match=r"^query_tokens: got 1 counts, expected one per sequence \(2\)"):
        planner.plan([[0], [0]], [5, 5], 16, 1, query_tokens=one)


@pytest.mark.parametrize("value", [torch.tensor([4.0]), numpy.array([4.0]), Raises(), "4", float, True, torch.tensor(True)])
@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_what_is_no_number_is_refused_by_name(planner, name, value):
    plan = planner.plan([[0]], [5], 16, 1)
    q, cache = torch.zeros(1, 8, 64, dtype=HALF), torch.zeros(1, 16, 2, 64, dtype=HALF)
    with pytest.raises(TypeError, match=f"^{name}: got .*, expected a number"):
        pa.run(plan, q, cache, cache, **{name: value})


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_a_number_that_wants_a_gradient_is_refused_by_name(planner, name):
    plan = planner.plan([[0]], [5], 16, 1)
    q, cache = torch.zeros(1, 8, 64, dtype=HALF), torch.zeros(1, 16, 2, 64, dtype=HALF)
    with pytest.raises(ValueError, match=f"^{name}: got a tensor with requires_grad=True, expected .*detach"):
        pa.run(plan, q, cache, cache, **{name: torch.tensor(0.5, requires_grad=True)})
    pa.run(plan, q, cache, cache, scale=torch.tensor(0.5))


@pytest.mark.parametrize("value", [True, numpy.True_, numpy.array(True), torch.tensor(True)])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_truth_value_is_no_factor(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got .*bool.*, expected a number"):
        run(**{name: value})


OBJECTS = {
    "query_tree": lambda value: pa.Planner(SHAPE_64, "cpu", query_tree=value),
    "page_runs": lambda value: pa.Planner(SHAPE_64, "cpu", page_runs=value),
    "sinks": lambda value: pa.supports(SHAPE_64, 16, sinks=value),
    "alibi": lambda value: pa.supports(SHAPE_64, 16, alibi=value),
    "mode": lambda value: pa.Planner(SHAPE_64, "cpu", mode=value),
    "variants": lambda value: pa.Planner(SHAPE_64, "cpu", variants=value),
    "variants, one": lambda value: pa.Planner(SHAPE_64, "cpu", variants=[value]),
    "shape": lambda value: pa.Planner(value, "cpu"),
    "capacity": lambda value: pa.Planner(SHAPE_64, "cpu", capacity=value),
    "planner": lambda value: pa.PlanBuffers(value, 16, 1),
    "name": lambda value: pa.DeviceProfile.named(value),
    "text": lambda value: pa.DeviceProfile.from_json(value),
    "return_lse": lambda value: run(return_lse=value),
    "kv_layout": lambda value: run(kv_layout=value),
    "workspace": lambda value: run(workspace=value),
    "plan": lambda value: run(plan=value),
}


def run(**changes):
    plan = pa.Planner(SHAPE_64, "cpu").plan([[0]], [5], 16, 1)
    q, cache = torch.zeros(1, 8, 64, dtype=HALF), torch.zeros(1, 16, 2, 64, dtype=HALF)
    return pa.run(**(dict(plan=plan, q=q, k_cache=cache, v_cache=cache.clone()) | changes))


@pytest.mark.parametrize("value", [1, 0.5, torch.tensor([1]), object()], ids=["int", "float", "Tensor", "object"])
@pytest.mark.parametrize("argument", OBJECTS)
def test_objects_of_another_type_are_refused_by_name(argument, value):
    with pytest.raises(TypeError) as raised:
        OBJECTS[argument](value)
    assert str(raised.value).startswith(f"{argument.split(',')[0]}: got ")


MASKED = numpy.ma.array([[0, 1]], mask=[[0, 1]], dtype=numpy.int32)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("block_tables", lambda planner: planner.plan(MASKED, [20], 16, 2)),
        ("block_tables", lambda planner: planner.plan([MASKED[0]], [20], 16, 2)),
        ("lengths", lambda planner: planner.plan([[0], [1]], MASKED[0], 16, 2)),
        ("query_tokens", lambda planner: planner.plan([[0], [1]], [5, 5], 16, 2, query_tokens=MASKED[0])),
        ("q", lambda planner: run(q=numpy.ma.zeros((1, 8, 64), numpy.float16), out=torch.zeros(1, 8, 64, dtype=HALF))),
    ],
)
def test_masked_arrays_are_refused(planner, name, call):
    """DLPack hands over what is behind the mask, too."""
    with pytest.raises(TypeError, match=f"^{name}: got a MaskedArray, expected an array without a mask"):
        call(planner)


def expanded(*size):
    """As many elements as one likes in the memory of one."""
    return torch.zeros([1] * len(size), dtype=torch.int32).expand(size)


MANY = 2**31 - 1
LARGE = {
    "table_rows": dict(block_tables=TABLE, table_rows=expanded(MANY)),
    "parents": dict(parents=expanded(MANY)),
    "parents[0]": dict(parents=expanded(1, MANY)),
    "parents, trees": dict(parents=expanded(MANY, 2)),
    "parents[0], in a list": dict(parents=[expanded(MANY)]),
    "parents, a list": dict(parents=range(10**9)),
    "parents, without an end": dict(parents=itertools.count()),
    "query_tokens": dict(query_tokens=expanded(MANY)),
    "block_tables": dict(lengths=expanded(MANY)),
    "block_tables, rows": dict(block_tables=expanded(MANY, 1)),
    "block_tables, indptr": dict(block_tables=(expanded(MANY), [0])),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_is_too_large_is_refused_before_it_is_read(name):
    planner = pa.Planner(SHAPE_64, "cpu", query_tree=True)
    with pytest.raises((ValueError, TypeError)) as raised:
        planner.plan(**(dict(block_tables=[[0]], lengths=[5], page_size=16, num_pages=1) | LARGE[name]))
    assert str(raised.value).startswith(f"{name.split(',')[0]}: got ")


def test_what_stands_behind_the_needed_ids_may_be_of_any_size(planner):
    assert planner.plan(([0, 1], expanded(MANY)), [5], 16, 1).sequence_count == 1
    assert planner.plan(expanded(1, MANY), [5], 16, 1).sequence_count == 1
    plan = planner.plan([[0]], [5], 16, 1)
    with pytest.raises(ValueError, match="^changed_rows: got 2147483647 rows, expected at most all 1"):
        planner.advance(plan, [[0]], [5], expanded(MANY))


class Producer:
    """Any DLPack producer."""

    def __init__(self, give=None, device=(1, 0)):
        self.give, self.device = give, device

    def __dlpack_device__(self):
        if isinstance(self.device, Exception):
            raise self.device
        return self.device

    def __dlpack__(self, **options):
        if isinstance(self.give, Exception):
            raise self.give
        return self.give if self.give is not None else torch.zeros(1, 16, 2, 64, dtype=HALF).__dlpack__(**options)


class WithoutDevice:
    def __dlpack__(self, **options):
        return torch.zeros(1, 16, 2, 64, dtype=HALF).__dlpack__(**options)


def used_capsule():
    capsule = torch.zeros(1, 16, 2, 64, dtype=HALF).__dlpack__()
    torch.from_dlpack(type("Once", (), {"__dlpack__": lambda self, **_: capsule, "__dlpack_device__": lambda self: (1, 0)})())
    return capsule


ERRORS = [RuntimeError("no"), KeyError("no"), ValueError("no"), TypeError("no"), BufferError("no"), AttributeError("no")]
PRODUCERS = {
    "without a device": WithoutDevice,
    **{f"device {device!r}": lambda device=device: Producer(device=device)
       for device in [None, (1,), (1, 0, 0), ("cpu", 0), (1 << 40, 0), [1, 0], (2, -1), (7, 0), (2, 0), (2, 99), *ERRORS]},
    **{f"raises {error!r}": lambda error=error: Producer(error) for error in ERRORS},
    "no capsule": lambda: Producer(3),
    "a used capsule": lambda: Producer(used_capsule()),
    "the class of tensors": lambda: torch.Tensor,
    "the class of arrays": lambda: numpy.ndarray,
    "a generator": lambda: (row for row in []),
}


@pytest.mark.parametrize("what", PRODUCERS)
@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache", "out"])
def test_producers_that_raise_or_lie_are_refused_by_name(argument, what):
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: got "):
        run(**{argument: PRODUCERS[what]()})


class DlTensor(ctypes.Structure):
    """The first member of what a capsule holds."""

    _fields_ = [
        ("data", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    ]


@pytest.mark.parametrize(("data", "offset"), [(1 << 63, 1 << 63), (1 << 20, (1 << 64) - 16), (0, 4096), (0, 0)])
@pytest.mark.parametrize("argument", ["q", "k_cache", "v_cache"])
def test_memory_that_is_behind_its_end_is_refused(argument, data, offset):
    """An offset that takes an address around to one that might be there, and one from no address."""
    capsule = torch.zeros(1, 16, 2, 64, dtype=HALF).__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = DlTensor.from_address(pointer(capsule, b"dltensor"))
    tensor.data, tensor.byte_offset = data, offset
    with pytest.raises(ValueError, match=f"^{argument}: got a (DLPack tensor|Producer without memory)"):
        run(**{argument: Producer(capsule)})


class Resizes:
    """A producer whose code takes the memory of another argument away."""

    def __init__(self, tensor, victim):
        self.tensor, self.victim = tensor, victim

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **options):
        self.victim.untyped_storage().resize_(0)
        return self.tensor.__dlpack__(**options)


def test_memory_that_another_arguments_code_takes_away_is_missed():
    q, k = torch.zeros(1, 8, 64, dtype=HALF), torch.zeros(1, 16, 2, 64, dtype=HALF)
    with pytest.raises(ValueError, match="^q: got a tensor of .* resized to 0"):
        run(q=q, k_cache=k, v_cache=Resizes(torch.zeros_like(k), q), out=torch.zeros_like(q))
    new, caches = torch.zeros(1, 2, 64, dtype=HALF), [torch.zeros(1, 16, 2, 64, dtype=HALF) for _ in range(2)]
    with pytest.raises(ValueError, match="^k_cache: got a tensor of .* resized to 0"):
        pa.append_kv(new, new, caches[0], Resizes(caches[1], caches[0]), torch.tensor([0]))
    lengths = torch.full((4,), 5, dtype=torch.int32)
    tables = Resizes(torch.zeros(4, 1, dtype=torch.int32), lengths)
    with pytest.raises(ValueError, match="^lengths: got a tensor of .* resized to 0"):
        pa.Planner(SHAPE_64, "cpu").plan(tables, lengths, 16, 1)


class ResizesArray(Resizes):
    def __dlpack__(self, **options):
        self.victim.resize(0, refcheck=False)
        return self.tensor.__dlpack__(**options)


def test_an_array_that_another_arguments_code_resizes_is_missed():
    k = torch.zeros(1, 16, 2, 64, dtype=HALF)
    for name in ("q", "out"):
        arrays = {one: numpy.zeros((1, 8, 64), dtype=numpy.float16) for one in ("q", "out")}
        with pytest.raises(ValueError, match=f"^{name}: "):
            run(k_cache=k, v_cache=ResizesArray(torch.zeros_like(k), arrays[name]), **arrays)
    new, cache = torch.zeros(1, 2, 64, dtype=HALF), numpy.zeros((1, 16, 2, 64), dtype=numpy.float16)
    with pytest.raises(ValueError, match="^k_cache: "):
        pa.append_kv(new, new, cache, ResizesArray(torch.zeros_like(k), cache), torch.tensor([0]))
    lengths = numpy.full(4, 5, dtype=numpy.int32)
    tables = ResizesArray(torch.zeros(4, 1, dtype=torch.int32), lengths)
    with pytest.raises(ValueError, match="^(lengths|block_tables): "):
        pa.Planner(SHAPE_64, "cpu").plan(tables, lengths, 16, 1)


def test_a_cap_that_a_plan_has_not_says_softcap():
    planner = pa.Planner(SHAPE_64, pa.DeviceProfile.named("h100-sxm"), variants=["wgmma128"])
    with pytest.raises(ValueError, match="softcap"):
        run(plan=planner.plan([[0]], [5], 16, 1), softcap=5.0)
