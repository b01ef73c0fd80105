"""The record of `make gpu`: RESULTS/<device>/<date>-<commit>.json, checked against schema.json before it is written.

A record holds the stages that ran. One that exists for the same device, day and commit keeps the stages that did not
run again.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..report import RESULTS, write

KIND = "gpu"
VERSION = 2  # of the layout; 1 had no layout of the stage models
SCHEMA = json.loads(Path(__file__).with_name("schema.json").read_text())
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


def check(value, schema: dict = SCHEMA, where: str = "record") -> None:
    """Raises ValueError that names the first place where the value is not as the schema says. JSON Schema, as far as
    schema.json uses it: type, enum, required, properties, additionalProperties, items, minimum, $ref to $defs."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    types = schema.get("type", list(TYPES))
    types = [types] if isinstance(types, str) else types
    fits = any(isinstance(value, TYPES[t]) and (t == "boolean" or not isinstance(value, bool)) for t in types)
    if not fits:
        raise ValueError(f"{where}: expected {' or '.join(types)}, got {value!r:.80}")
    if "enum" in schema and value not in schema["enum"]:
        raise ValueError(f"{where}: expected one of {', '.join(map(str, schema['enum']))}, got {value!r:.80}")
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= schema.get("minimum", value):
        raise ValueError(f"{where}: expected at least {schema['minimum']}, got {value}")
    if isinstance(value, dict):
        for name in schema.get("required", ()):
            if name not in value:
                raise ValueError(f"{where}: expected a member {name!r}, got {', '.join(value) or 'none'}")
        others = schema.get("additionalProperties", {})
        for name, member in value.items():
            own = schema.get("properties", {}).get(name, others)
            if own is False:
                raise ValueError(f"{where}: expected no member {name!r}")
            check(member, own, f"{where}.{name}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{i}]")


def path_of(record: dict, folder: Path) -> Path:
    commit = record["commit"]
    name = f"{record['date'][:10]}-{commit['id'][:10]}" + ("-dirty" if commit["dirty"] else "")
    name += "" if record["grid"] == "full" else f"-{record['grid']}"
    return folder / slug(record["device"]["name"]) / f"{name}.json"


def slug(device_name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device_name.lower()).strip("-")


def save(record: dict, folder: Path = RESULTS) -> Path:
    """Whole or not at all; ValueError where it is not as the schema says."""
    check(record)
    path = path_of(record, folder)
    if path.exists():
        record = merged(json.loads(path.read_text()), record)
        check(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
    return path


def merged(old: dict, new: dict) -> dict:
    return old | new | {"stages": old["stages"] | new["stages"]}


def load_all(folder: Path = RESULTS) -> list[dict]:
    """The GPU records there, oldest first, each with its "path" relative to the folder."""
    found = []
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text())
        if record.get("kind") == KIND:
            found.append(record | {"path": path.relative_to(folder).as_posix()})
    return sorted(found, key=lambda record: record["date"])


def cases(record: dict) -> list[dict]:
    return record["stages"].get("bench", {}).get("cases", [])
