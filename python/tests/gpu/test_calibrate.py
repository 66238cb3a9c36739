"""`calibrate` on a device. It times kernels: nothing else should run on the device meanwhile."""

import torch

import prefix_attn as pa
from support import caches, queries, random_forest, reference, tolerance


def test_a_calibrated_profile_plans(no_tf32):
    built_in, measured = pa.DeviceProfile.detect("cuda:0"), pa.calibrate("cuda:0")
    assert pa.DeviceProfile.from_json(measured.to_json()).to_json() == measured.to_json()
    assert measured.name == built_in.name and measured.to_json() != built_in.to_json()
    batch = random_forest(3)
    k, v = caches(batch, torch.float16, "NHD", 3, 8, 128, "cuda:0")
    q = queries(len(batch.lengths), torch.float16, 4, 32, 128, "cuda:0")
    planner = pa.Planner(pa.AttentionShape(32, 8, 128, torch.float16), measured)
    plan = planner.plan(batch.block_tables, batch.lengths, 16, batch.num_pages)
    out = pa.run(plan, q, k, v)
    expected, _ = reference(batch, q, k, v, "NHD", dtype=torch.float32)
    torch.testing.assert_close(out.float(), expected, atol=tolerance(q.dtype), rtol=0)
