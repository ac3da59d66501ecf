"""What does a run leave behind? A folder that was empty before, with files that are whole at every moment.

config.yaml           everything needed to run it again: Config.from_yaml
metrics.csv           a row for each epoch, as it ends
last.ckpt             where the training stands, for going on
adapter.safetensors   what was trained, at its best epoch
summary.json          how well, how large, how fast
curves.png            losses and accuracies
widths.png            how wide each adapter is in each phase, of a method that changes that
"""

import csv
import io
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .._atomic import is_temporary, write_atomically

_FILES = ("config.yaml", "metrics.csv", "last.ckpt", "adapter.safetensors", "summary.json", "curves.png", "widths.png")


class RunFolder:
    """A new folder for one run: the one that `out` names, or the next free `runs/<name>-<number>`.

    Raises:
        ValueError: `out` exists and is not an empty folder.
        OSError: it cannot be made or written.
    """

    def __init__(self, out: str | os.PathLike | None, name: str):
        if out is None:
            self._made = [] if Path("runs").is_dir() else [Path("runs")]
            self.path = _next_free(re.sub(r"[^\w.-]+", "-", name))
            self._made.append(self.path)
        else:
            self.path = Path(out)
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                kind = "is not empty" if self.path.is_dir() else "is not a folder"
                raise ValueError(f"the output folder {self.path} exists and {kind}: name a new one with --out")
            self._made = [folder for folder in (*reversed(self.path.parents), self.path) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
        probe = self.path / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    @property
    def adapter(self) -> Path:
        """The file of the trained tensors."""
        return self.path / "adapter.safetensors"

    def discard(self) -> None:
        """Takes the folders away again that were made here and are still empty."""
        for folder in reversed(self._made):
            if not any(folder.iterdir()):
                folder.rmdir()

    def write_config(self, text: str) -> None:
        """config.yaml."""
        write_atomically(self.path / "config.yaml", text.encode())

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """metrics.csv, in place of the one of the epoch before; `rows` have the same keys."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / "metrics.csv", text.getvalue().encode())

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """last.ckpt, in place of the one of the epoch before."""
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        write_atomically(self.path / "last.ckpt", buffer.getvalue())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        write_atomically(self.path / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def write_curves(self, png: bytes) -> None:
        """curves.png."""
        write_atomically(self.path / "curves.png", png)

    def write_widths(self, png: bytes) -> None:
        """widths.png."""
        write_atomically(self.path / "widths.png", png)


def clear(path: Path) -> None:
    """Removes what a run that came to no end has left, so that it can begin again.

    Raises:
        ValueError: there is something that no run writes; nothing is removed then.
    """
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path} is no folder of a run: move it away")
    foreign = [each.name for each in path.iterdir() if each.name not in _FILES and not is_temporary(each)]
    if foreign:
        raise ValueError(f"{path} holds {', '.join(sorted(foreign)[:5])}, which is of no run: move it away")
    shutil.rmtree(path)


def _next_free(name: str) -> Path:
    for number in itertools.count(1):
        path = Path("runs") / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not Path("runs").is_dir():
                raise
