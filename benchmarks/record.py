"""With what was a result made? The facts that stand beside every committed number."""

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import vitadapter_ext


def made_with(command: str) -> dict[str, str]:
    """Command, date, commit ("" without git), machine and versions."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} CPU threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "vitadapter_ext": vitadapter_ext.__version__,
    }
