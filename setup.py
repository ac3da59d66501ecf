"""Builds the two libraries: `_C` (operators, CPU kernels) always, `_cuda` (CUDA kernels) where nvcc and torch allow it.

VITADAPTER_CUDA=0 leaves CUDA out, VITADAPTER_CUDA=1 insists on it. TORCH_CUDA_ARCH_LIST names the architectures.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
MINIMUM_TORCH = (2, 11)


def stop(sentence: str):
    raise SystemExit(f"vitadapter_ext: {sentence}")


def find_cxx_compiler() -> list[str]:
    """The C++ compiler's command, as words; stops with a sentence where there is none."""
    wanted = os.environ.get("CXX", "").split()
    compiler = next((name for name in (wanted[:1] or ["c++", "g++", "clang++"]) if shutil.which(name)), None)
    if compiler is None:
        missing = f"CXX names {wanted[0]!r}, which is not there" if wanted else "no C++ compiler was found"
        stop(
            f"{missing}; install g++ 11 or newer (Debian, Ubuntu: apt-get install g++; "
            "Fedora: dnf install gcc-c++; conda: conda install gxx)"
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        stop("Python.h was not found; install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    return wanted or [compiler]


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def toolkit_version(home: Path) -> str | None:
    """The CUDA version of a complete toolkit (compiler, headers and libraries), else None."""
    libraries = [home / "lib64", home / "lib", home / "targets" / f"{platform.machine()}-linux" / "lib"]
    complete = (home / "include" / "cuda_runtime.h").exists() and any((d / "libcudart.so").exists() for d in libraries)
    nvcc = home / "bin" / "nvcc"
    if not (complete and nvcc.exists()):
        return None
    found = re.search(r"release (\d+\.\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else None


def find_toolkit() -> tuple[Path, str] | None:
    """(folder, version) of the first complete CUDA toolkit; a folder with nothing but a wrapper of nvcc is none."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    candidates += ["/usr/local/cuda", *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for candidate in candidates:
        if candidate and (version := toolkit_version(Path(candidate))):
            return Path(candidate), version
    return None


def newer(version: str, least: tuple[int, int]) -> bool:
    """Whether a CUDA version is `least` or newer."""
    return tuple(map(int, version.split("."))) >= least


def plan_cuda(torch_cuda: str | None) -> dict[str, str]:
    """What to build for CUDA: {"home", "version", "architectures"}, or {"off": why}."""
    if os.environ.get("VITADAPTER_CUDA") == "0":
        return {"off": "built with VITADAPTER_CUDA=0"}
    toolkit = find_toolkit()
    if torch_cuda is None:
        off = "built with a torch that has no CUDA"
    elif toolkit is None:
        off = "no complete CUDA toolkit (nvcc, headers, libraries) was found when this was built"
    elif toolkit[1].split(".")[0] != torch_cuda.split(".")[0]:
        off = f"built where the CUDA toolkit was {toolkit[1]} and torch's {torch_cuda}; their majors must be equal"
    else:
        home, version = toolkit
        # One list for every machine: 8.6 and 8.9 run the code of 8.0, what is newer than 10.0 compiles the PTX.
        default = "8.0;9.0;10.0+PTX" if newer(version, (12, 8)) else "8.0;9.0+PTX"
        return {
            "home": str(home),
            "version": version,
            "architectures": os.environ.get("TORCH_CUDA_ARCH_LIST") or default,
        }
    if os.environ.get("VITADAPTER_CUDA") == "1":
        stop(f"VITADAPTER_CUDA=1, but CUDA cannot be built: {off}")
    return {"off": off}


def package_version() -> str:
    return re.search(r'__version__ = "(.+)"', (HERE / "vitadapter_ext" / "__init__.py").read_text())[1]


def write_build_config(torch_version: str, compiler: list[str], cuda: dict[str, str]) -> Path:
    """Writes the header that build_info() reads from; returns its folder."""
    values = {
        "VERSION": package_version(),
        "TORCH_VERSION": torch_version,
        "CXX_COMPILER": first_line(*compiler, "--version"),
        "CUDA_VERSION": cuda.get("version", ""),
        "CUDA_ARCHITECTURES": cuda.get("architectures", ""),
        "CUDA_TOOLKIT": cuda.get("home", ""),
        "CUDA_OFF_REASON": cuda.get("off", ""),
    }
    quoted = {key: value.replace("\\", "\\\\").replace('"', '\\"') for key, value in values.items()}
    text = "#pragma once\n" + "".join(f'#define VITADAPTER_{key} "{value}"\n' for key, value in quoted.items())
    header = HERE / "build" / "config" / "vitadapter_build_config.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    # Left alone when nothing changed, or ninja would compile again.
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return header.parent


def sources(pattern: str) -> list[str]:
    return sorted(glob(pattern, root_dir=HERE))


def extensions() -> dict:
    try:
        import pybind11
        import torch
    except ImportError as error:
        stop(f"{error.name} is needed to build; install it first, or build without --no-build-isolation")
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < MINIMUM_TORCH:
        stop(f"torch is {torch.__version__}; {'.'.join(map(str, MINIMUM_TORCH))} or newer is needed")
    compiler = find_cxx_compiler()
    cuda = plan_cuda(torch.version.cuda)
    os.environ["CXX"] = " ".join(compiler)  # or torch and setuptools would each look for one of their own
    config = write_build_config(torch.__version__, compiler, cuda)
    if "off" in cuda:
        print(f"vitadapter_ext: CPU kernels only: {cuda['off']}")
    else:
        print(f"vitadapter_ext: CUDA {cuda['version']} from {cuda['home']} for {cuda['architectures']}")
        os.environ.update(CUDA_HOME=cuda["home"], TORCH_CUDA_ARCH_LIST=cuda["architectures"])

    from torch.utils import cpp_extension  # reads CUDA_HOME when it is imported

    class BuildExtension(cpp_extension.BuildExtension):
        """Keeps the objects in one place, where pip's editable install would throw them away and a wheel begin anew:
        what has not changed is compiled once for both."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(HERE / "build" / "objects")

    # The stable ABI of torch 2.11: what is built on any newer torch runs on all of them.
    macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
    cuda_bindings = sources("csrc/bind/*_cuda.cpp")
    cxx = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"]
    link = ["-s"]  # without the names of what is not exported
    modules = [
        cpp_extension.CppExtension(
            "vitadapter_ext._C",
            sorted({*sources("csrc/bind/*.cpp"), *sources("csrc/cpu/*.cpp")} - set(cuda_bindings)),
            include_dirs=[str(config), pybind11.get_include()],
            define_macros=macros,
            extra_compile_args={"cxx": cxx},
            extra_link_args=link,
        )
    ]
    if "off" not in cuda:
        nvcc = ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden"]
        if newer(cuda["version"], (12, 8)):
            nvcc.append("--compress-mode=size")  # a third off the wheel
        modules.append(
            cpp_extension.CUDAExtension(
                "vitadapter_ext._cuda",
                [*cuda_bindings, *sources("csrc/cuda/*.cu")],
                # USE_CUDA opens the CUDA part of torch's stable headers.
                define_macros=[*macros, ("USE_CUDA", None)],
                extra_compile_args={"cxx": cxx, "nvcc": nvcc},
                extra_link_args=link,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


setup(**extensions())
