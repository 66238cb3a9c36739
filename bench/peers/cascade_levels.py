"""The levels of FlashInfer's cascade attention, from block tables.

Cascade attention computes one attention per level, over groups of consecutive queries that have a run of pages in common,
and merges the levels by their log-sum-exp. Level k has the k-th shared run on each sequence's way from the root of the
prefix forest, the last level what only that sequence reads. Where a sequence has fewer runs than others, its group on the
other levels has no pages.
"""

import dataclasses

MAX_LEVELS = 8
"""A level is a kernel and a merge: forests as deep as chains are not what cascade attention is for."""


class NotExpressible(Exception):
    """Why a batch cannot be put into levels."""


@dataclasses.dataclass
class Level:
    """One level in FlashInfer's terms; groups in the order of `Cascade.order`."""

    qo_indptr: list = dataclasses.field(default_factory=lambda: [0])
    kv_indptr: list = dataclasses.field(default_factory=lambda: [0])
    kv_indices: list = dataclasses.field(default_factory=list)
    last_page_len: list = dataclasses.field(default_factory=list)

    def add(self, rows, pages, last_page_len):
        """A group of `rows` queries over `pages`."""
        self.qo_indptr.append(self.qo_indptr[-1] + rows)
        self.kv_indices.extend(pages)
        self.kv_indptr.append(len(self.kv_indices))
        self.last_page_len.append(last_page_len if pages else 0)


@dataclasses.dataclass
class Cascade:
    """`order[i]` is the sequence whose query stands in row i: groups must be consecutive."""

    order: list
    levels: list


def cascade(page_size, lengths, block_tables):
    """Puts a batch into levels. Raises NotExpressible."""
    if not lengths or min(lengths) == 0:
        raise NotExpressible("a sequence is empty: no level has keys for it")
    order, shared, private_begin = _forest(page_size, lengths, block_tables)
    if len(shared) + 1 > MAX_LEVELS:
        raise NotExpressible(f"{len(shared) + 1} levels, more than {MAX_LEVELS}")
    levels = []
    for runs in shared:
        level = Level()
        row = 0
        for first, count, pages in runs:
            if first > row:
                level.add(first - row, [], 0)
            level.add(count, pages, page_size)
            row = first + count
        if row < len(order):
            level.add(len(order) - row, [], 0)
        levels.append(level)
    private = Level()
    for sequence in order:
        pages = block_tables[sequence][private_begin[sequence] : -(-lengths[sequence] // page_size)]
        tokens = lengths[sequence] - private_begin[sequence] * page_size
        private.add(1, pages, tokens - (len(pages) - 1) * page_size)
    return Cascade(order, [*levels, private])


def _forest(page_size, lengths, block_tables):
    """The sequences in forest order; by level the shared runs as (first row, rows, pages); where each sequence's private
    pages begin."""
    full_pages = [length // page_size for length in lengths]
    order, shared, private_begin = [], [], {}
    # Sequences that agree on the pages before `begin`, and the number of shared runs these pages make.
    stack = [(list(range(len(lengths))), 0, 0)]
    while stack:
        members, begin, depth = stack.pop()
        if len(members) == 1:
            private_begin[members[0]] = begin
            order.append(members[0])
            continue
        first = block_tables[members[0]]
        end, limit = begin, min(full_pages[member] for member in members)
        while end < limit and all(block_tables[member][end] == first[end] for member in members):
            end += 1
        if end > begin:
            while len(shared) <= depth:
                shared.append([])
            shared[depth].append((len(order), len(members), first[begin:end]))
            depth += 1
        groups = {}
        for member in members:
            # A sequence without another full page is by itself from here on.
            key = block_tables[member][end] if full_pages[member] > end else ("ends", member)
            groups.setdefault(key, []).append(member)
        stack.extend((group, end, depth) for group in reversed(groups.values()))
    return order, shared, private_begin
