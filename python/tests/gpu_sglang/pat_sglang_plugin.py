"""SGLang plug-in of the test: operators in torch (no sgl_kernel is here), counters in a file, a negative control."""

import json
import os
import sys
import threading
import time


def register():
    from sglang.srt.layers.utils import multi_platform
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.model_executor import forward_batch_info

    multi_platform.MultiPlatformOp.dispatch_forward = lambda self: self.forward_native
    memory_pool.can_use_store_cache = lambda *args, **kwargs: False
    forward_batch_info.clamp_position = forward_batch_info._clamp_position_native
    if os.environ.get("PAT_STATS"):
        threading.Thread(target=write_stats, daemon=True).start()


def write_stats():
    path = f"{os.environ['PAT_STATS']}.{os.getpid()}"
    is_wrapped = False
    while True:
        backend = sys.modules.get("prefix_attn.sglang.backend")
        if backend is not None and hasattr(backend, "_PrefixAttn"):
            if not is_wrapped and os.environ.get("PAT_BROKEN"):
                wrap(backend._PrefixAttn)
            is_wrapped = True
            with open(path + ".part", "w") as file:
                json.dump(dict(backend.stats), file)
            os.replace(path + ".part", path)
        time.sleep(0.05)


def wrap(cls):
    right = cls.init_forward_metadata

    def without_newest(self, batch):
        right(self, batch)
        if self._batch is not None:
            tables, lengths = self._batch
            self._batch = tables, (lengths - 1).clamp(min=0)

    cls.init_forward_metadata = without_newest
