"""Named workloads, as versioned JSON files: those of scenarios/, and a user's own."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tts_kernels.errors import check_int, fail

from .checks import fail_unknown
from .shapes import ModelShape
from .workload import Workload, share_kept

FORMAT = 1
FIELDS = {"format", "id", "name", "version", "title", "note", "model", "max_positions", "workload"}


@dataclass(frozen=True)
class Scenario:
    """A workload on a model. `version` is raised when its numbers change; the old ones stay in the repository."""

    id: str
    name: str
    version: int
    title: str
    model: ModelShape
    workload: Workload
    note: str = ""

    @classmethod
    def load(cls, name: str | Path) -> Scenario:
        """By id ("A") or name ("leaf-bon-longcot"), or from the path of a JSON file like those of scenarios/."""
        for scenario in scenarios():
            if str(name).lower() in (scenario.id.lower(), scenario.name):
                return scenario
        path = Path(name)
        if path.suffix != ".json":
            fail_unknown("scenario", str(name), [known for s in scenarios() for known in (s.id, s.name)])
        return cls.from_json(path.read_text(encoding="utf-8"), str(path))

    @classmethod
    def from_json(cls, text: str, source: str) -> Scenario:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            fail(source, "JSON", error)
        if not isinstance(data, dict):
            fail(source, "an object", type(data).__name__, TypeError)
        if data.get("format") != FORMAT:
            fail(f"{source}: format", FORMAT, data.get("format"))
        for key in ("id", "name", "model", "workload"):
            if key not in data:
                fail(source, f"a field {key!r}", ", ".join(data))
        for key in data:
            if key not in FIELDS:
                fail(source, "the fields " + ", ".join(sorted(FIELDS)), repr(key))
        model = ModelShape.preset(data["model"])
        if "max_positions" in data:
            model = dataclasses.replace(model, max_positions=check_int("max_positions", data["max_positions"], 1))
        workload = dataclasses.replace(Workload.from_dict(data["workload"]), name=data["name"])
        version = check_int("version", data.get("version", 1), 1)
        return cls(data["id"], data["name"], version, data.get("title", ""), model, workload, data.get("note", ""))

    def with_n(self, n: int) -> Scenario:
        """The same with n candidates, of which a search keeps the same share."""
        work = self.workload
        keep = None if work.keep is None else share_kept(check_int("n", n, 1), work)
        return dataclasses.replace(self, workload=dataclasses.replace(work, n=n, keep=keep))


def scenarios() -> list[Scenario]:
    """Those that come with the package, by id."""
    folder = resources.files(__package__).joinpath("scenarios")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return sorted((Scenario.from_json(f.read_text(encoding="utf-8"), f.name) for f in files), key=lambda s: s.id)
