"""The generator against golden_generator.json, which a Rust test writes. Needs numpy; torch is tested where it is there."""

import json
import pathlib
import unittest

import numpy

import generator

try:
    import torch
except ImportError:
    torch = None

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_generator.json").read_text())


def array(values, *shape):
    return numpy.asarray(values, dtype=numpy.int32).reshape(shape)


def f16_bits(values):
    return values.astype(numpy.float16).view(numpy.uint16).ravel().tolist()


def bf16_bits(values):
    """Rounded to nearest even; numpy has no bfloat16."""
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).ravel().tolist()


class Generator(unittest.TestCase):
    def test_rows(self):
        self.assertGreaterEqual(len(GOLDEN["rows"]), 5)
        for row in GOLDEN["rows"]:
            coordinates = [array([row[name]], 1) for name in ("page", "token", "head")]
            values = generator.draw(row["seed"], row["tensor"], *coordinates, array(row["dims"], -1))
            self.assertEqual(values.dtype, numpy.float32)
            self.assertEqual(f16_bits(values), row["f16_bits"], row)
            self.assertEqual(bf16_bits(values), row["bf16_bits"], row)

    def test_pool(self):
        pool = GOLDEN["pool"]
        page, token, head, dim = (
            array(range(pool[name]), *shape)
            for name, shape in [("pages", (-1, 1, 1, 1)), ("tokens", (-1, 1, 1)), ("heads", (-1, 1)), ("head_dim", (-1,))]
        )
        values = generator.draw(pool["seed"], pool["tensor"], page, token, head, dim)
        self.assertEqual(f16_bits(values), pool["f16_bits"])

    @unittest.skipIf(torch is None, "torch is not installed")
    def test_torch_draws_the_same(self):
        pool = GOLDEN["pool"]
        out = torch.empty([pool[name] for name in ("pages", "tokens", "heads", "head_dim")], dtype=torch.float16)
        for chunk_elements in (1, 40, 1 << 26):
            out.zero_()
            generator.fill(out, pool["seed"], pool["tensor"], chunk_elements)
            self.assertEqual(f16_bits(out.numpy()), pool["f16_bits"])
        for row in GOLDEN["rows"]:
            coordinates = [torch.tensor([row[name]], dtype=torch.int32) for name in ("page", "token", "head", "dims")]
            values = generator.draw(row["seed"], row["tensor"], *coordinates)
            for dtype, bits in ((torch.float16, row["f16_bits"]), (torch.bfloat16, row["bf16_bits"])):
                # int16 has the bits of uint16 for numbers whose sign is read back below.
                self.assertEqual([b & 0xFFFF for b in values.to(dtype).view(torch.int16).ravel().tolist()], bits)


if __name__ == "__main__":
    unittest.main()
