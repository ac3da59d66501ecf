"""How is a file written whole or not at all? To a temporary name beside it, flushed to the disk, then renamed."""

import os
import uuid
from pathlib import Path

_PREFIX = ".vitadapter-"


def is_temporary(path: Path) -> bool:
    """Whether it is what a killed `write_atomically` left."""
    return path.name.startswith(_PREFIX)


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by `data`; where that fails (full disk, no permission) the old file stays whole.

    Raises:
        OSError: with the path in it, after the temporary file is gone.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}")
    try:
        # Not tempfile's: its files are private, where a result has the permissions of the old file or of any new one.
        with open(temporary, "xb") as file:
            if path.exists():
                os.chmod(temporary, path.stat().st_mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
