"""Which compiled libraries are there? Loads `_C` (operators, CPU kernels) and, where it fits torch, `_cuda`."""

import functools
import warnings
from pathlib import Path

import torch

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"vitadapter_ext's compiled library cannot be loaded ({error}); "
        "in its source folder run 'pip install -e .', elsewhere 'pip install' the folder"
    ) from error


def _load_cuda() -> str:
    """Loads the CUDA kernels; returns why they are off, or "" when they are on."""
    built = _C.build_info()["cuda_version"]
    if not built:
        return _C.build_info()["cuda_off_reason"]
    if torch.version.cuda is None:
        return f"built for CUDA {built}, but this torch {torch.__version__} is a build without CUDA"
    if torch.version.cuda.split(".")[0] != built.split(".")[0]:
        return f"built for CUDA {built}, but this torch {torch.__version__} is a build for CUDA {torch.version.cuda}"
    library = Path(_C.__file__).with_name(Path(_C.__file__).name.replace("_C", "_cuda", 1))
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} cannot be loaded: {error.__cause__ or error}"
    return ""


CUDA_OFF_REASON = _load_cuda()
# Asked for now, so that a level that VITADAPTER_CPU names and nobody has is an error here, not a slower run.
CPU_LEVEL = _C.cpu_level()

# "meta" counts: its kernel is the fake one.
_DEVICES_WITH_KERNELS = {"cpu", "meta"} | ({"cuda"} if not CUDA_OFF_REASON else set())


def has_kernels(device: str) -> bool:
    """Whether the ops have hand-written kernels for this type of device."""
    return device in _DEVICES_WITH_KERNELS


@functools.cache
def warn_without_kernels(device: str) -> None:
    """Says once for each type of device that the slower reference answers there, and why."""
    why = CUDA_OFF_REASON if device == "cuda" else "there are none for it"
    warnings.warn(f"vitadapter_ext runs plain PyTorch instead of its kernels on {device!r}: {why}", stacklevel=3)


def build_info() -> dict:
    """What this build is: versions, compiler, CUDA architectures, CPU level, why CUDA is off ("" when it is on)."""
    return {**_C.build_info(), "cpu_level": CPU_LEVEL, "cuda_off_reason": CUDA_OFF_REASON}
