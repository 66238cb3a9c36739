"""Random ragged forests with features, ours beside torch in float64 and, where they are installed, FlashAttention 3 (of vLLM) and
FlashInfer. Wrong is what is beyond the numerics rule (rule.py).

    python3 bench/differential/run.py --device cuda:0 --cases 20000 --seconds 300

Prints the cases, how many were wrong, and the worst error over its allowance, for every implementation. Ends with an error where
ours is wrong, or too few cases ran. Others' wrong cases are counted, and shown with --verbose."""

import argparse
import collections
import itertools
import math
import sys
import time

import torch

import forests
import peers
from rule import Expected

import prefix_attn as pa


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--peers", default="fa3,flashinfer", help="implementations beside ours, where they are installed")
    parser.add_argument("--peers-every", type=int, default=4, help="peers see every so many cases")
    parser.add_argument("--only", default="", help="cases of one type and some head dims, such as float16:64,128: several processes")
    parser.add_argument("--with-peers-only", action="store_true", help="no cases that no peer can express")
    parser.add_argument("--verbose", action="store_true")
    return parser.parse_args()


def features():
    """What the installed wheel computes: asked, not known."""
    shape = pa.AttentionShape(8, 2, 128, "bfloat16")
    asked = {
        "softcap": {"softcap": 30.0},
        "sinks": {"sinks": True},
        "window": {"window": 128},
        "chunk": {"chunk": 128},
        "fp8": {"kv_dtype": "float8_e4m3fn"},
    }
    found = tuple(name for name, more in asked.items() if pa.supports(shape, 16, **more) is None)
    pairs = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512))
    shapes = {pair: pa.AttentionShape(8, 2, pair[0], "bfloat16", value_head_dim=pair[1]) for pair in pairs}
    return found, tuple(pair for pair, shape in shapes.items() if pa.supports(shape, 16) is None)


class Tensors:
    """q, k and v of a case. Where no sequence has a token, k and v are NaN: an implementation that reads there shows. `clean` are
    the same without NaN, for those that multiply what they do not use by zero."""

    def __init__(self, case, device):
        generator = torch.Generator(device=device)
        generator.manual_seed(case.index)
        dtype = getattr(torch, case.dtype)

        def normal(*shape, dtype=dtype):
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        self.q = normal(len(case.row_lengths), case.q_heads, case.head_dim)
        kv_dtype = getattr(torch, case.kv_dtype or case.dtype)
        self.k_clean, self.v_clean = (
            normal(case.num_pages, case.page_size, case.kv_heads, dim, dtype=kv_dtype)
            for dim in (case.head_dim, case.value_head_dim)
        )
        owned = torch.zeros(case.num_pages, dtype=torch.int64)
        for table, length in zip(case.block_tables, case.lengths):
            for index, page in enumerate(table):
                owned[page] = max(int(owned[page]), min(length - index * case.page_size, case.page_size))
        unowned = (torch.arange(case.page_size)[None, :] >= owned[:, None]).to(device)[:, :, None, None]
        # As integers: torch neither fills nor joins all 8-bit types.
        bits = torch.uint8 if case.kv_dtype else torch.int16
        nan = int(torch.tensor([math.nan], dtype=kv_dtype).view(bits))
        k, v = (pool.view(bits).masked_fill(unowned, nan) for pool in (self.k_clean, self.v_clean))
        if case.layout == "HND":
            k, v = (pool.transpose(1, 2).contiguous() for pool in (k, v))
        elif case.layout == "interleaved":
            both = torch.cat([k, v], dim=-1)
            k, v = both[..., : case.head_dim], both[..., case.head_dim :]
        k, v = k.view(kv_dtype), v.view(kv_dtype)
        self.k, self.v, self.layout = k, v, "HND" if case.layout == "HND" else "NHD"
        self.sinks = normal(case.q_heads).float() if case.has_sinks else None


class Ours:
    """The wheel."""

    name = "pat-rs"
    sums_in_float32 = True

    def __init__(self, device):
        self.device, self.planners = device, {}

    def run(self, case, tensors):
        """Out and log-sum-exp of all rows. Raises what the wheel raises."""
        mode = f"fixed-chunk:{2 * case.page_size}" if case.mode == "fixed-chunk" else case.mode
        more = {"softcap": case.softcap} if case.softcap else {}
        reach = {name: size for name, size in (("window", case.window), ("chunk", case.chunk)) if size}
        of_shape = (case.q_heads, case.kv_heads, case.head_dim, case.dtype, case.kv_dtype or case.dtype, case.value_head_dim)
        key = (*of_shape, mode, case.softcap, case.window, case.chunk)
        if key not in self.planners:
            shape = pa.AttentionShape(*of_shape[:4], kv_dtype=of_shape[4], value_head_dim=of_shape[5])
            self.planners[key] = pa.Planner(shape, device=self.device, mode=mode, **more, **reach)
        is_plain = all(count == 1 for count in case.query_tokens)
        plan = self.planners[key].plan(
            case.block_tables,
            case.lengths,
            case.page_size,
            case.num_pages,
            query_tokens=None if is_plain else case.query_tokens,
        )
        if tensors.sinks is not None:
            more["sinks"] = tensors.sinks
        for name, scales in zip(("k_scale", "v_scale"), case.scales):
            if scales:
                of_heads = torch.tensor(scales, dtype=torch.float32, device=tensors.q.device)
                more[name] = of_heads if len(scales) > 1 else scales[0]
        out = tensors.q.new_full((*tensors.q.shape[:2], case.value_head_dim), math.nan)
        return pa.run(
            plan,
            tensors.q,
            tensors.k,
            tensors.v,
            out,
            scale=case.scale,
            return_lse=True,
            kv_layout=tensors.layout,
            **more,
        )


def expresses(implementation, case):
    """Whether it does, as far as the case without its tensors says."""
    try:
        implementation.check(case)
    except peers.NotExpressible:
        return False
    return True


def is_of(case, only):
    """Whether a case is one of `--only`."""
    dtype, _, head_dims = only.partition(":")
    return case.dtype == dtype and case.head_dim in map(int, head_dims.split(","))


class Tally:
    """Of one implementation."""

    def __init__(self):
        self.cases = self.wrong = self.rough_lse = 0
        self.worst = 0.0
        self.passed_over = collections.Counter()

    def line(self, name):
        text = f"{name}: {self.cases} cases, {self.wrong} wrong, worst error at {self.worst:.3f} of its allowance"
        if self.rough_lse:
            text += f"; log-sum-exps of {self.rough_lse} beyond the rule"
        for reason, count in self.passed_over.most_common():
            text += f"; {count} cases passed over: {reason}"
        return text


def main():
    args = options()
    device = torch.device(args.device)
    found, head_dims = features()
    ours = Ours(args.device)
    others = peers.installed([name for name in args.peers.split(",") if name], device)
    tallies = {name: Tally() for name in [ours.name, *(other.name for other in others)]}
    seen = collections.Counter()
    begin = said = time.monotonic()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"device {where}, torch {torch.__version__}, features {found or 'none'}, head dims {head_dims}", flush=True)
    for index in itertools.count(args.first):
        if tallies[ours.name].cases == args.cases or time.monotonic() - begin > args.seconds:
            break
        case = forests.draw(args.seed, index, head_dims, found)
        if args.only and not is_of(case, args.only):
            continue
        if args.with_peers_only and not any(expresses(other, case) for other in others):
            continue
        tensors = Tensors(case, device)
        expected = Expected(case, tensors.q, tensors.k_clean, tensors.v_clean, tensors.sinks)
        seen[case.dtype, case.head_dim, case.layout] += 1
        seen[case.kv_dtype or "K and V as Q"] += 1
        seen["window" if case.window else "chunk" if case.chunk else "full reach"] += 1
        seen["softcap" if case.softcap else "no softcap"] += 1
        seen["sinks" if case.has_sinks else "no sinks"] += 1
        seen["drafts" if any(count > 1 for count in case.query_tokens) else "no drafts"] += 1
        beside = others if index % args.peers_every == 0 else []
        for implementation in [ours, *beside]:
            tally = tallies[implementation.name]
            try:
                out, lse = implementation.run(case, tensors)
            except peers.NotExpressible as reason:
                tally.passed_over[str(reason)] += 1
                continue
            rows = None
            if implementation is not ours:
                # What an empty sequence gives is ours to define.
                rows = expected.lengths > 0
            ratio = expected.worst_ratio(out, lse if implementation.sums_in_float32 else None, rows)
            tally.cases += 1
            tally.worst = max(tally.worst, ratio)
            if not implementation.sums_in_float32 and expected.worst_ratio(out, lse, rows) > max(ratio, 1):
                tally.rough_lse += 1
            if ratio > 1:
                tally.wrong += 1
                if implementation is ours or args.verbose:
                    print(f"{implementation.name}: WRONG: {ratio:.3f} of the allowance: {case}", flush=True)
        # A run that is ended from outside has said what it came to.
        if time.monotonic() - said > 20:
            said = time.monotonic()
            for name, tally in tallies.items():
                print(f"after {said - begin:.0f} s, {tally.line(name)}", flush=True)
    for name, tally in tallies.items():
        print(tally.line(name))
    for kind, count in sorted(seen.items(), key=str):
        print(f"  {kind if isinstance(kind, str) else ' '.join(map(str, kind))}: {count}")
    ran = tallies[ours.name].cases
    print(f"{ran} of {args.cases} cases in {time.monotonic() - begin:.0f} s")
    return 0 if ran == args.cases and tallies[ours.name].wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
