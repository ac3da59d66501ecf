"""How is a file written whole or not at all? To a temporary name beside it, flushed to the disk, then renamed."""

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
    """Replaces `path` by `data`; where that fails (full disk, no permission) the old file stays whole.

    Raises:
        OSError: with the path in it, after the temporary file is gone.
    """
    path, temporary = Path(os.path.realpath(path)), None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".vitadapter-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; a result file has the permissions that any new file would have.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
