"""Caches that `append_kv` refuses, and that K and V are then both as they were; layouts in one storage that it takes."""

import numpy
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import prefix_attn as pa

SIZE = (6, 16, 2, 64)


class Wrapper(torch.Tensor):
    """A tensor whose elements are somewhere else."""

    @staticmethod
    def __new__(cls, size):
        return torch.Tensor._make_wrapper_subclass(cls, size, dtype=torch.float16)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class FreesItself:
    """A producer whose tensor has no memory any more when it is handed over."""

    def __init__(self):
        self.tensor = torch.zeros(SIZE, dtype=torch.float16)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **options):
        self.tensor.untyped_storage().resize_(0)
        return self.tensor.__dlpack__(**options)


def fake():
    with FakeTensorMode():
        return torch.zeros(SIZE, dtype=torch.float16)


WITHOUT_MEMORY = {
    "FakeTensor": fake,
    "Tensor": lambda: torch._efficientzerotensor(SIZE, dtype=torch.float16),
    "Wrapper": lambda: Wrapper(SIZE),
    "Tensor, functional": lambda: torch._to_functional_tensor(torch.zeros(SIZE, dtype=torch.float16)),
    "FreesItself": FreesItself,
}


def rows(seed):
    return torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(seed)).half()


def append(k_cache, v_cache, **changes):
    arguments = dict(k_new=rows(0), v_new=rows(1), slots=torch.tensor([17, 3, 95])) | changes
    pa.append_kv(k_cache=k_cache, v_cache=v_cache, **arguments)


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
@pytest.mark.parametrize("argument", ["k_cache", "v_cache"])
def test_a_cache_without_memory_is_refused_and_the_other_is_as_it_was(name, argument):
    other = torch.zeros(SIZE, dtype=torch.float16)
    bad = WITHOUT_MEMORY[name]()
    pair = (bad, other) if argument == "k_cache" else (other, bad)
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: got a {name.split(',')[0]} without memory"):
        append(*pair)
    assert (other == 0).all()


@pytest.mark.parametrize("argument", ["k_new", "v_new", "slots"])
def test_an_input_without_memory_is_refused(argument):
    caches = [torch.zeros(SIZE, dtype=torch.float16) for _ in range(2)]
    with FakeTensorMode():
        bad = torch.zeros(3, dtype=torch.int64) if argument == "slots" else torch.zeros((3, 2, 64), dtype=torch.float16)
    with pytest.raises(ValueError, match=f"^{argument}: got a FakeTensor without memory"):
        append(*caches, **{argument: bad})
    assert all((cache == 0).all() for cache in caches)


def strided(size, strides, offset=0, storage=None):
    storage = torch.zeros(1 << 16, dtype=torch.float16) if storage is None else storage
    return torch.as_strided(storage, size, strides, offset)


OVERLAPPING = {
    "every page the first one": ((6, 16, 2, 64), (0, 128, 64, 1)),
    "pages that begin in each other": ((6, 16, 2, 64), (1024, 128, 64, 1)),
    "tokens that begin in each other": ((6, 16, 2, 64), (2048, 64, 64, 1)),
    "heads on top of each other": ((6, 16, 2, 64), (2048, 128, 32, 1)),
    "heads that are all one": ((6, 16, 2, 64), (2048, 128, 0, 1)),
    "the last row beyond the next page": ((6, 16, 2, 64), (2040, 128, 64, 1)),
}


@pytest.mark.parametrize("argument", ["k_cache", "v_cache"])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_a_cache_that_overlaps_itself_is_refused(argument, name):
    pair = dict(k_cache=torch.zeros(SIZE, dtype=torch.float16), v_cache=torch.zeros(SIZE, dtype=torch.float16))
    pair[argument] = strided(*OVERLAPPING[name])
    with pytest.raises(ValueError, match=f"^{argument}: got shape .* expected a cache whose elements do not overlap"):
        append(**pair)
    assert all((cache == 0).all() for cache in pair.values())


def pairs():
    """K and V in one storage, by name: sizes, strides and offsets of both, and whether they have an element in common."""
    nhd, hnd = (6, 16, 2, 64), (6, 2, 16, 64)
    return {
        "one and the same": (nhd, (2048, 128, 64, 1), 0, (2048, 128, 64, 1), 0, True),
        "a page later": (nhd, (2048, 128, 64, 1), 0, (2048, 128, 64, 1), 2048, True),
        "a token later": (nhd, (2048, 128, 64, 1), 0, (2048, 128, 64, 1), 128, True),
        "half a head later": (nhd, (2048, 128, 64, 1), 0, (2048, 128, 64, 1), 32, True),
        "five pages and a bit before": (nhd, (2048, 128, 64, 1), 5 * 2048 + 1920, (2048, 128, 64, 1), 0, True),
        "one behind the other": (nhd, (2048, 128, 64, 1), 0, (2048, 128, 64, 1), 6 * 2048, False),
        "pages in turns": (nhd, (4096, 128, 64, 1), 0, (4096, 128, 64, 1), 2048, False),
        "pages in turns, V first": (nhd, (4096, 128, 64, 1), 2048, (4096, 128, 64, 1), 0, False),
        "tokens in turns": (nhd, (4096, 256, 64, 1), 0, (4096, 256, 64, 1), 128, False),
        "heads in turns": (nhd, (4096, 256, 128, 1), 0, (4096, 256, 128, 1), 64, False),
        "heads in turns, by head": (hnd, (4096, 2048, 128, 1), 0, (4096, 2048, 128, 1), 64, False),
        "pages in turns, one by head": (nhd, (4096, 128, 64, 1), 0, (4096, 64, 1024, 1), 2048, False),
        "one by head on top": (nhd, (4096, 128, 64, 1), 0, (4096, 64, 1024, 1), 1984, True),
        "heads in turns, one on top of the next": (nhd, (4096, 256, 128, 1), 0, (4096, 256, 128, 1), 128, True),
        "V's rows at the end of K's": (nhd, (4096, 256, 128, 1), 0, (4096, 256, 128, 1), 56, True),
    }


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_caches_in_one_storage_share_no_element(name, form):
    size, k_strides, k_offset, v_strides, v_offset, overlap = pairs()[name]
    storage = torch.full((1 << 15,), 7, dtype=torch.float16)
    k, v = strided(size, k_strides, k_offset, storage), strided(size, v_strides, v_offset, storage)
    elements = torch.arange(1 << 15)
    met = set(strided(size, k_strides, k_offset, elements).flatten().tolist())
    assert overlap == bool(met & set(strided(size, v_strides, v_offset, elements).flatten().tolist()))
    layout = "HND" if size[1] == 2 else "NHD"
    given = (k, v) if form == "torch" else (k.numpy(), v.numpy())
    if overlap:
        with pytest.raises(ValueError, match="^v_cache: got memory that holds elements of k_cache"):
            append(*given, kv_layout=layout)
        assert (storage == 7).all()
        return
    append(*given, kv_layout=layout)
    for cache, new in ((k, rows(0)), (v, rows(1))):
        by_token = cache if layout == "NHD" else cache.transpose(1, 2)
        assert all(torch.equal(by_token[slot // 16, slot % 16], row) for slot, row in zip((17, 3, 95), new))
    written = 2 * 3 * 2 * 64
    assert int((storage == 7).sum()) >= (1 << 15) - written


def test_random_layouts_are_judged_by_their_elements():
    """Views of one storage as `as_strided` makes them: refused where an element is in both, taken where none is."""
    generator = torch.Generator().manual_seed(5)

    def draw(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    judged = {True: 0, False: 0}
    for _ in range(400):
        order = torch.randperm(3, generator=generator).tolist()
        size = [draw(1, 2, 3), draw(1, 2, 4), draw(1, 2)]
        strides, step = [0, 0, 0], 16 * draw(1, 2)
        for dim in order:
            strides[dim] = step
            step *= size[dim] + draw(0, 0, 1)
        strides, k_dim, v_dim = (*strides, 1), 16, draw(16, 16, 8)
        offset = 8 * int(torch.randint(40, (), generator=generator))
        views = [((*size, k_dim), strides, 0), ((*size, v_dim), strides, offset)]
        if draw(False, True):
            # The narrower one first.
            views = [((*size, v_dim), strides, 0), ((*size, k_dim), strides, offset)]
        elements = torch.arange(1 << 12)
        k_elements, v_elements = (set(torch.as_strided(elements, *view).flatten().tolist()) for view in views)
        overlap = bool(k_elements & v_elements)
        judged[overlap] += 1
        storage = torch.zeros(1 << 12, dtype=torch.float16)
        k, v = (torch.as_strided(storage, *view) for view in views)
        new = [torch.ones(1, size[2], cache.shape[-1], dtype=torch.float16) for cache in (k, v)]
        try:
            pa.append_kv(*new, k, v, torch.tensor([0]))
            accepted = True
        except ValueError as error:
            assert "elements of k_cache" in str(error)
            accepted = False
        assert accepted != overlap, views
    assert min(judged.values()) > 50


def test_slots_inside_a_cache_are_refused():
    storage = torch.zeros(SIZE, dtype=torch.float16)
    slots = storage.view(torch.int64).view(-1)[:3]
    with pytest.raises(ValueError, match="^slots: got memory of k_cache"):
        append(storage, torch.zeros_like(storage), slots=slots)


def test_a_slot_beyond_the_cache_writes_neither():
    caches = [numpy.zeros(SIZE, numpy.float16) for _ in range(2)]
    with pytest.raises(ValueError, match=r"^slots\[2\]"):
        append(*caches, slots=torch.tensor([0, 1, 96]))
    assert not any(cache.any() for cache in caches)
