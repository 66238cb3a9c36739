"""Reads what `pat bench export` has written."""

import dataclasses
import json
import pathlib

EXCHANGE_VERSION = 1


def pages_of(batch):
    """Pages of each sequence that hold tokens."""
    return [-(-length // batch.page_size) for length in batch.lengths]


class Refused(Exception):
    """Input that cannot be used; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Block tables and lengths of a decode step (docs/batch-format.md)."""

    page_size: int
    num_pages: int
    lengths: list
    block_tables: list


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A batch and the shape to measure it with; the fields are those of the manifest."""

    name: str
    suite: str
    batch: Batch
    nheads_q: int
    nheads_kv: int
    head_dim: int
    dtype: str
    softmax_scale: float
    sample: list

    @property
    def title(self):
        """Name and heads, for people."""
        return f"{self.name} {self.nheads_q}/{self.nheads_kv}"


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Seed of the tensors, and what is to be measured."""

    seed: int
    configurations: list


def read_json(path):
    """A JSON file; Refused with its name where it cannot be read."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise Refused(f"{path}: not JSON: {error}") from error


def load(folder):
    """The exchange in a folder."""
    folder = pathlib.Path(folder)
    manifest = read_json(folder / "manifest.json")
    version = manifest.get("exchange_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise Refused(f"{folder / 'manifest.json'} is not a manifest of pat bench export")
    if version != EXCHANGE_VERSION:
        raise Refused(f"{folder}: exchange version {version}, this program reads {EXCHANGE_VERSION}: export it again")
    batches = {}
    try:
        configurations = []
        for entry in manifest["configurations"]:
            file = entry["batch"]
            if file not in batches:
                batches[file] = Batch(**read_json(folder / file))
            configurations.append(Configuration(**{**entry, "batch": batches[file]}))
        return Exchange(manifest["seed"], configurations)
    except (KeyError, TypeError) as error:
        raise Refused(f"{folder}: not as pat bench export writes it: {error}") from error
