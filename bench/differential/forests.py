"""Random ragged forests with features: what the differential test compares implementations on. numpy only."""

from dataclasses import dataclass, field

import numpy as np

PAGE_SIZES = (1, 16, 24, 32, 64, 128)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16, 16, 71)
MODES = ("auto", "auto", "auto", "flat", "packed", "per-node", "fixed-chunk")
LAYOUTS = ("NHD", "HND", "interleaved")
WINDOWS = (1, 5, 16, 33, 128, 100_000)
CHUNKS = (1, 16, 40, 256)
KV_DTYPES = ("float8_e4m3fn", "float8_e5m2")
USUAL_HEAD_DIMS = ((64, 64), (128, 128))
"""The only ones of 8-bit K and V."""
LOUDNESS = (1.0, 1.0, 16.0)
"""Factors on the usual scale of the scores: at 16 running maxima grow, and outputs are corrected."""


@dataclass
class Case:
    """A batch and a model. Equal seeds and indices give equal cases."""

    index: int
    dtype: str
    q_heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    page_size: int
    num_pages: int
    lengths: list
    block_tables: list
    """Of each sequence, the page ids that its length needs."""
    layout: str
    mode: str
    scale: float
    query_tokens: list
    """Of each sequence; 1 in plain decode."""
    softcap: float = 0.0
    has_sinks: bool = False
    window: int = 0
    """The last tokens that a row sees; 0: all."""
    chunk: int = 0
    """A row sees the tokens since the last multiple of so many; 0: all."""
    kv_dtype: str = ""
    """8-bit type of K and V; "": that of Q."""
    scales: tuple = ((), ())
    """Factors of K and of V: one of all elements, or one of each KV head; none where K and V do not have 8 bits."""
    row_lengths: np.ndarray = field(init=False)
    """Tokens that each row sees; a query token is a row."""
    row_sequences: np.ndarray = field(init=False)

    def __post_init__(self):
        rows = [
            (max(0, length - count + 1 + i), sequence)
            for sequence, (length, count) in enumerate(zip(self.lengths, self.query_tokens))
            for i in range(count)
        ]
        self.row_lengths = np.array([length for length, _ in rows], dtype=np.int64)
        self.row_sequences = np.array([sequence for _, sequence in rows], dtype=np.int64)

    def first_tokens(self):
        """The first token that each row sees."""
        if self.window:
            return np.maximum(self.row_lengths - self.window, 0)
        if self.chunk:
            return np.maximum(self.row_lengths - 1, 0) // self.chunk * self.chunk
        return np.zeros_like(self.row_lengths)

    def padded_tables(self):
        """`[sequences, most pages]`, int32, page 0 behind a sequence's own."""
        widest = max((len(table) for table in self.block_tables), default=0)
        tables = np.zeros((len(self.block_tables), max(widest, 1)), dtype=np.int32)
        for row, table in zip(tables, self.block_tables):
            row[: len(table)] = table
        return tables


def draw_reach(rng, features):
    """A window or a chunk, or neither; the other one is 0."""
    reach = {"window": 0, "chunk": 0}
    kind = str(rng.choice(["window", "chunk", "", "", ""]))
    if kind in features:
        reach[kind] = int(rng.choice(WINDOWS if kind == "window" else CHUNKS))
    return reach


def draw_eight_bit(rng, kv_heads, features, head_dims):
    """An 8-bit type of K and V with its factors, or none."""
    if "fp8" not in features or head_dims not in USUAL_HEAD_DIMS or rng.random() > 0.3:
        return {}
    count = kv_heads if rng.random() < 0.5 else 1
    scales = tuple(tuple(float(np.float32(scale)) for scale in rng.uniform(0.25, 4, count)) for _ in range(2))
    return {"kv_dtype": str(rng.choice(KV_DTYPES)), "scales": scales}


def draw(seed, index, head_dims=((64, 64), (128, 128)), features=()):
    """Case `index`. Sequences continue a prefix of an earlier one, repeat it, are cut from it, or stand alone; lengths fall on,
    before and behind page borders; some are 0. `head_dims` are those of K and of V; `features` are those that may be drawn:
    "softcap", "sinks", "window", "chunk", "fp8"."""
    rng = np.random.default_rng([seed, index])
    page_size = int(rng.choice(PAGE_SIZES))
    kv_heads = int(rng.integers(1, 4))
    q_heads = kv_heads * int(rng.choice(GROUPS))
    # Half of them of the dims that all have.
    usual = [pair for pair in head_dims if pair in USUAL_HEAD_DIMS]
    among = usual if usual and rng.random() < 0.5 else head_dims
    head_dim, value_head_dim = among[rng.integers(0, len(among))]
    tables, lengths, next_page = [], [], 0
    for _ in range(int(rng.integers(1, 13))):
        kind = int(rng.integers(0, 8))
        parent = int(rng.integers(0, len(tables))) if tables else None
        if kind == 0:
            table, length = [], 0
        elif kind == 1:
            table, length = [], 1
        elif kind == 2 and tables:
            table, length = list(tables[parent]), lengths[parent]
        elif kind == 3 and tables:
            table, length = list(tables[parent]), int(rng.integers(0, lengths[parent] + 1))
        else:
            table = list(tables[parent]) if tables and kind < 7 else []
            table = table[: int(rng.integers(0, len(table) + 1))]
            # A shared last page must be full for a longer sequence to own tokens behind it.
            tails = (page_size - 1, page_size, page_size + 1, int(rng.integers(0, 3 * max(page_size, 40) + 1)))
            length = len(table) * page_size + int(tails[rng.integers(0, 4)])
        needed = -(-length // page_size)
        while len(table) < needed:
            table.append(next_page)
            next_page += 1
        tables.append(table[:needed])
        lengths.append(length)
    num_pages = next_page + int(rng.integers(1, 4))
    ids = rng.permutation(num_pages)
    query_tokens = [1] * len(lengths)
    if rng.random() < 0.2:
        # Drafts: the last tokens of a sequence; an empty one has padding rows.
        query_tokens = [int(rng.integers(1, min(4, length) + 1)) if length else 1 for length in lengths]
    return Case(
        index=index,
        dtype=str(rng.choice(["float16", "bfloat16"])),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        page_size=page_size,
        num_pages=num_pages,
        lengths=lengths,
        block_tables=[[int(ids[page]) for page in table] for table in tables],
        layout=str(rng.choice(LAYOUTS)),
        mode=str(rng.choice(MODES)),
        scale=float(rng.choice(LOUDNESS)) * head_dim**-0.5,
        query_tokens=query_tokens,
        softcap=float(rng.choice([5.0, 30.0])) if "softcap" in features and rng.random() < 0.25 else 0.0,
        has_sinks="sinks" in features and bool(rng.random() < 0.25),
        **draw_reach(rng, features),
        **draw_eight_bit(rng, kv_heads, features, (head_dim, value_head_dim)),
    )
