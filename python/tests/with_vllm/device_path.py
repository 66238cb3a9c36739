"""The device's way through the plug-in on the CPU: plan buffers, bound runs and raw pointers."""

import ctypes

import prefix_attn as pa
import torch

from prefix_attn.vllm import decoder


class Buffers:
    """`pa.PlanBuffers` on the CPU, whose runs take pointers as those on a device do, and are kept for replays."""

    def __init__(self, launches, *args):
        self.launches, self.real, self.rows = launches, make_buffers(*args), 0

    def upload(self, plan):
        self.real.upload(plan)
        self.rows = plan.sequence_count

    def bind(self, key_cache, value_cache, q, out, lse=None, *, workspace, **scores):
        assert isinstance(workspace, pa.Workspace)
        return Run(self, self.real.bind(key_cache, value_cache, q, out, lse, **scores), q, out)


class Run:
    """`pa.BoundRun`."""

    def __init__(self, buffers, real, q, out):
        self.buffers, self.real, self.q, self.out = buffers, real, q, out

    def run_ptr(self, q_ptr, out_ptr):
        def launch():
            rows = self.buffers.rows
            self.q[:rows] = at_address(q_ptr, self.q, rows)
            self.real.run()
            at_address(out_ptr, self.out, rows).copy_(self.out[:rows])

        launch()
        self.buffers.launches.append(launch)


make_buffers = pa.PlanBuffers


def at_address(address, like, rows):
    """Memory as a tensor with the strides of `like`."""
    count = 1 + sum((n - 1) * stride for n, stride in zip((rows, *like.shape[1:]), like.stride()))
    memory = (ctypes.c_uint16 * count).from_address(address)
    flat = torch.frombuffer(memory, dtype=like.dtype)
    return flat.as_strided((rows, *like.shape[1:]), like.stride())


def install(monkeypatch) -> list:
    """Every `DecodeRows` made from now on goes the device's way.

    Returns:
        The launches, which grow: called again, one runs with its old addresses and the plan that its buffers hold then.
    """
    launches = []
    monkeypatch.setattr(decoder, "_HostCapacity", decoder._DeviceCapacity)
    monkeypatch.setattr(pa, "PlanBuffers", lambda *args: Buffers(launches, *args))
    return launches
