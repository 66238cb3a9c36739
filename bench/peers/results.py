"""The result file of `pat bench kernels`, into which the figures of other libraries are merged."""

import json
import os
import pathlib

from exchange import Refused, read_json

SCHEMA_VERSION = 3
FIRST_SUITE = "figure10"
"""Suite of records written before version 2, which do not name theirs."""

OURS = "pat-rs"
OURS_HERE = "prefix_attn"
"""This library by its Python package, timed beside the peers and in turns with them."""


class ResultFile:
    """A result file and where it is; `save` replaces it as a whole."""

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.content = read_json(path)
        version = self.content.get("schema_version") if isinstance(self.content, dict) else None
        records = self.content.get("records") if isinstance(version, int) else None
        if not isinstance(records, list) or not isinstance(self.content.get("device"), str):
            raise Refused(f"{path} is not a result file of pat bench kernels")
        if version > SCHEMA_VERSION:
            raise Refused(f"{path} has schema version {version}, this program reads up to {SCHEMA_VERSION}: update it")
        self.content["schema_version"] = SCHEMA_VERSION
        self.content.setdefault("methods", {})
        try:
            self._records = {_key(record, record["tree"]): record for record in records}
        except (KeyError, TypeError) as error:
            raise Refused(f"{path}: a record without {error}") from error

    @property
    def device(self):
        """Name of the device that the figures are from."""
        return self.content["device"]

    def record(self, configuration):
        """The record of a configuration, or None."""
        record = self._records.get(_key(vars(configuration), configuration.name))
        if record is not None and record["block_size"] != configuration.batch.page_size:
            return None
        return record

    def set_method(self, name, version, note):
        """Says what a method is."""
        self.content["methods"][name] = {"version": version, "note": note}

    def version_of(self, name):
        """The version that a method was measured with, or None."""
        return self.content["methods"].get(name, {}).get("version")

    def save(self):
        """Writes the file aside and renames it, so that a killed run leaves a whole one."""
        aside = self.path.with_suffix(".json.new")
        aside.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def _key(fields, name):
    suite = fields.get("suite", FIRST_SUITE)
    return suite, name, fields["nheads_q"], fields["nheads_kv"], fields["head_dim"], fields["dtype"]


def is_measured(record, method):
    """Whether a record has a method's time, or the verdict that its answer is wrong."""
    return method in record.get("latencies", {}) or method in record.get("correctness", {})


def add(record, method, correctness, times):
    """Puts a method into a record. `times` has cold_ms, warm_ms and plan_ms (None: it plans nothing); None where the answer
    is wrong and was not timed."""
    record.setdefault("correctness", {})[method] = correctness
    if times is None:
        return
    record.setdefault("latencies", {})[method] = times["cold_ms"]
    record.setdefault("warm_latencies", {})[method] = times["warm_ms"]
    if times["plan_ms"] is not None:
        record.setdefault("plan_latencies", {})[method] = times["plan_ms"]


def forget(record, method):
    """Takes a method out of a record."""
    for field in ("latencies", "warm_latencies", "plan_latencies", "correctness"):
        record.get(field, {}).pop(method, None)
