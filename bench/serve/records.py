"""The file of records, JSON lines: one line a run, appended when it has ended; a line that was cut off is passed over."""

import json
import os

SCHEMA_VERSION = 1


def key(record):
    """What tells runs apart: a run whose key the file has is not repeated."""
    config = record["config"]
    names = ("model", "trace", "ATTENTION_BACKEND", "request_rate", "admission", "mode", "form", "window", "workload_seed",
        "arrival_seed")
    return tuple(str(config.get(name)) for name in names)


def read(path):
    """The records of a file; none where there is no file."""
    if not os.path.exists(path):
        return []
    records = []
    with open(path) as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the run that was cut off is repeated
            if isinstance(record, dict) and isinstance(record.get("config"), dict):
                records.append(record)
    return records


def append(path, record):
    """Adds a line, on the disk when this returns."""
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    torn = os.path.exists(path) and os.path.getsize(path) > 0 and not ends_with_newline(path)
    with open(path, "a") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def ends_with_newline(path):
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
