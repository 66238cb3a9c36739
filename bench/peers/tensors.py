"""Q and the KV pools of configurations on the device, drawn once for as many of them as possible."""

import dataclasses
import functools

import torch

import generator
from exchange import Configuration, pages_of
from reference import exact_rows

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Case:
    """A configuration with its tensors: q `[sequences, q_heads, head_dim]`, k and v `[pages, page_size, kv_heads, head_dim]`."""

    configuration: Configuration
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @functools.cached_property
    def host_tables(self):
        """Block tables as engines keep them: int32 `[sequences, most pages of one]`, padded with page 0."""
        counts = pages_of(self.configuration.batch)
        width = max(counts, default=0)
        rows = [table[:count] + [0] * (width - count) for table, count in zip(self.configuration.batch.block_tables, counts)]
        return torch.tensor(rows, dtype=torch.int32)

    @functools.cached_property
    def tables(self):
        """The same on the device."""
        return self.host_tables.to(self.q.device)

    @functools.cached_property
    def exact(self):
        """The exact output of the sampled rows, by (sequence, KV head)."""
        return {(sequence, kv_head): exact_rows(self, sequence, kv_head) for sequence, kv_head in self.configuration.sample}


def pool_kind(configuration):
    """Configurations of one kind have pools that are beginnings of the largest of them: an element depends on its page,
    token, head and position alone."""
    return configuration.batch.page_size, configuration.nheads_kv, configuration.head_dim, configuration.dtype


def measuring_order(configurations):
    """Kind by kind, the largest pool first: the others are slices of it. Where it does not fit, the next one is tried."""
    kinds = {}
    for configuration in configurations:
        kinds.setdefault(pool_kind(configuration), []).append(configuration)
    return [
        configuration
        for kind in kinds.values()
        for configuration in sorted(kind, key=lambda configuration: -configuration.batch.num_pages)
    ]


class Tensors:
    """Draws tensors and keeps the pools of the last kind."""

    def __init__(self, seed, device):
        self._seed, self._device = seed, device
        self._kind, self._pools = None, None

    def case(self, configuration):
        """The tensors of a configuration."""
        kind, pages = pool_kind(configuration), configuration.batch.num_pages
        if self._kind != kind or self._pools[0].shape[0] < pages:
            self._kind, self._pools = None, None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            shape = (pages, *kind[:3])
            self._pools = [self._draw(tensor, shape, configuration.dtype) for tensor in (generator.K, generator.V)]
            self._kind = kind
        sequences = len(configuration.batch.lengths)
        q = self._draw(generator.Q, (sequences, 1, configuration.nheads_q, configuration.head_dim), configuration.dtype)
        k, v = (pool[:pages] for pool in self._pools)
        return Case(configuration, q.squeeze(1), k, v)

    def _draw(self, tensor, shape, dtype):
        out = torch.empty(shape, dtype=DTYPES[dtype], device=self._device)
        generator.fill(out, self._seed, tensor)
        return out
