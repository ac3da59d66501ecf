"""Which compiled libraries are there? Loads `_C` (operators, CPU kernels) and, where it fits torch, `_cuda`."""

import functools
import re
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

# What torch's TORCH_CUDA_ARCH_LIST may say instead of numbers; a name before its own beginning.
_NAMED_ARCHITECTURES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
    "Rubin": "10.7+PTX",
}
FAST_FROM = (8, 0)  # the compute capability that the fast CUDA kernels need


def code_for(architectures: str, capability: tuple[int, int]) -> tuple[int, int] | None:
    """The architecture whose code a GPU runs, of those that a library was built for; None where it runs none of it.

    Machine code runs on GPUs of its major version and the same or a later minor one, "a" on its own architecture alone,
    "f" within its major version; PTX also on all later GPUs, unless it is of an "a" or "f" architecture.

    Args:
        architectures: as TORCH_CUDA_ARCH_LIST has them, such as "8.0;9.0a 10.0+PTX" or "Hopper". Of what is neither a
            number nor a known name, such as "native", nobody but the build knew what it is: it is taken to fit.
    """
    for name, numbers in _NAMED_ARCHITECTURES.items():
        architectures = architectures.replace(name, numbers)
    fitting = []
    for word in re.split(r"[;,\s]+", architectures.strip("; ,")):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if not found:
            return tuple(capability)
        built = int(found[1]), int(found[2])
        family, ptx = found[3], found[4]
        if family == "a":
            fits = capability == built
        elif ptx and not family:
            fits = capability >= built
        else:
            fits = capability[0] == built[0] and capability[1] >= built[1]
        if fits:
            fitting.append(built)
    # The driver prefers machine code to PTX, and machine code is of the GPU's major version: the latest.
    return max(fitting, default=None)


def _named(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)!r} (compute capability {major}.{minor})"


def _find_kernels(device: torch.device) -> bool:
    # "meta" counts: its kernel is the fake one.
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    # Fake tensors may be on a GPU that is not there, and no library can be asked whether it fits.
    if CUDA_OFF_REASON or device.index is None or not torch.cuda.is_available():
        return not CUDA_OFF_REASON
    code = code_for(_C.build_info()["cuda_architectures"], torch.cuda.get_device_capability(device))
    if code is not None and code < FAST_FROM:
        fast = ".".join(map(str, FAST_FROM))
        warnings.warn(
            f"vitadapter_ext runs its simple kernels on {_named(device)}: the fast ones need {fast} or newer and code "
            f"for it; these are built for {_C.build_info()['cuda_architectures']}",
            stacklevel=5,
        )
    return code is not None


_has_kernels: dict[torch.device | str, bool] = {}


# A trace asks once, while it is made, and neither follows the queries below nor guards what they say.
@torch.compiler.assume_constant_result
def has_kernels(device: torch.device | str) -> bool:
    """Whether the ops have hand-written kernels that this device runs; of "cuda" without an index, whether they are
    loaded. Warns once for each GPU that runs the simple ones only."""
    answer = _has_kernels.get(device)  # every call of an op comes through here: one look-up
    if answer is None:
        answer = _has_kernels[device] = _find_kernels(torch.device(device))
    return answer


@functools.cache
def warn_without_kernels(device: torch.device) -> None:
    """Says once for each device that the slower reference answers there, and why."""
    name, why = repr(device.type), "there are none for it"
    if device.type == "cuda" and CUDA_OFF_REASON:
        why = CUDA_OFF_REASON
    elif device.type == "cuda":
        name, why = _named(device), f"they are built for {_C.build_info()['cuda_architectures']}"
    warnings.warn(f"vitadapter_ext runs plain PyTorch instead of its kernels on {name}: {why}", stacklevel=4)


def build_info() -> dict:
    """What this build is: versions, compiler, CUDA architectures, CPU level, why CUDA is off ("" when it is on)."""
    return {**_C.build_info(), "cpu_level": CPU_LEVEL, "cuda_off_reason": CUDA_OFF_REASON}
