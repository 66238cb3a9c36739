"""The program of the GPU runs (`gpu_transformers/drive.py`), small and on the CPU."""

import json
import pathlib
import sys

from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "gpu_transformers"))
import drive


def test_requests_of_the_gpu_runs(monkeypatch, tmp_path, shared_plans):
    for owner, names in [
        (ModelRunner, ["compute_batch"]),
        (PagedAttentionCache, ["search_prefix_match", "evict_cached_blocks"]),
        (OffloadingManager, ["offload_requests"]),
    ]:
        for name in names:
            if hasattr(owner, name):
                # What the program wraps is put back afterwards.
                monkeypatch.setattr(owner, name, getattr(owner, name))
    out = tmp_path / "out.json"
    size = ["--size", "tiny", "--layers", "1", "--device", "cpu", "--requests", "48"]
    assert drive.main([str(out), *size, "--modes", "eager", "--limit", "300"]) == 0
    modes = json.loads(out.read_text())["modes"]
    assert set(modes) == {"stock", "eager", "broken"} and modes["broken"]["beyond"] > 0
