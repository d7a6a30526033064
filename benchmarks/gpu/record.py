"""What a run has found, on disk after every row: whatever ends the run, the file is whole and has all rows."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import completed
from .peers import FAMILIES

#: Of the layout of the file.
FORMAT = 1
#: A row of ours with one of these is a failure of the run.
BAD = ("wrong", "failed", "error", "crashed", "timeout")


def slug(device: str) -> str:
    """A device's name as part of a file's name: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return words.removeprefix("nvidia-") or "unknown-device"


class Record:
    """The JSON of one run. Rows are made text once, so that writing the file again costs next to nothing."""

    def __init__(
        self, directory: Path, *, dry: bool, stem: str | None, about: dict[str, Any], hidden: Sequence[str] = ()
    ) -> None:
        # Results are published: folders of the machine have no place in the tracebacks they hold.
        self._hidden = sorted({f"{path}/" for path in hidden if path.count("/") > 1}, key=len, reverse=True)
        self.directory, self.dry, self._stem = directory, dry, stem
        now = datetime.datetime.now(datetime.timezone.utc)
        self._date = now.date().isoformat()
        self.about = {"format": FORMAT, "dry_run": dry, "started": now.isoformat(timespec="seconds"), **about}
        self.about |= {"complete": False, "ended": "", "seconds": 0.0, "planned": [], "environment": {}}
        self._sections: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, list[str]] = {}
        self.bad = 0
        directory.mkdir(parents=True, exist_ok=True)
        self.write()

    @property
    def path(self) -> Path:
        """`<date>-<device>.json`, as results are kept; the name of a dry run says that it is one."""
        device = slug(self.about["environment"].get("device", ""))
        stem = self._stem or ("dry-run" if self.dry else f"{self._date}-{device}")
        return self.directory / f"{stem}.json"

    def learn(self, facts: dict[str, Any]) -> None:
        """Takes in what is known of the environment. The file's name follows the device's."""
        before = self.path
        self.about["environment"] = self.about["environment"] | facts
        self.write()
        if self.path != before:
            before.unlink(missing_ok=True)

    def begin(self, section: str, title: str) -> None:
        self._sections[section] = {"title": title, "status": "begun", "seconds": 0.0}
        self._rows[section] = []
        self.write()

    def add(self, section: str, row: dict[str, Any]) -> dict[str, Any]:
        """Keeps a row, with its figures; returns it as it was kept."""
        row = completed(row, self.about["environment"])
        # A peer's compilation may fail as it likes; where a peer fails at a timing, the row says so and stays good.
        self.bad += row["status"] in BAD and row.get("contestant") not in FAMILIES
        self._rows[section].append(self._without_folders(json.dumps(row, allow_nan=False)))
        self.write()
        return row

    def end(self, section: str, status: str, **more: Any) -> None:
        """``status``: "done", "cut short", "failed" (the section itself, with its traceback) or "skipped"."""
        more = json.loads(self._without_folders(json.dumps(more)))
        self._sections[section] |= {"status": status, **more}
        self.bad += status == "failed"
        self.write()

    def _without_folders(self, text: str) -> str:
        for folder in self._hidden:
            text = text.replace(folder, "")
        return text

    def finish(self, ended: str, seconds: float) -> None:
        self.about |= {"complete": ended == "", "ended": ended, "seconds": round(seconds, 1)}
        self.about["passed"] = self.bad == 0
        self.write()

    def write(self) -> None:
        """Beside the old file, and then in its place."""
        path = self.path
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(self._text(), encoding="utf-8")
        os.replace(fresh, path)

    def _text(self) -> str:
        """One row a line."""
        sections = []
        for name, facts in self._sections.items():
            head = json.dumps(facts)[1:-1]
            rows = ",\n".join(self._rows[name])
            sections.append(f'{json.dumps(name)}: {{{head}, "rows": [\n{rows}\n]}}')
        about = json.dumps(self.about, indent=1)[1:-2]
        return f'{{{about},\n "sections": {{\n' + ",\n".join(sections) + "\n}}\n"
