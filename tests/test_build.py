"""Does the build say what it is, stop with a sentence where it must, and use nothing but PyTorch's stable ABI?"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitadapter_ext as va
from vitadapter_ext import _library

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(Path(va.__file__).parent.glob("_c*.so")) + sorted(Path(va.__file__).parent.glob("_C*.so"))


def test_build_info_tells_the_truth():
    info = va.build_info()
    assert info["version"] == va.__version__
    assert info["cpu_level"] == (os.environ.get("VITADAPTER_CPU") or va._C.cpu_levels()[-1])
    assert "cxx_compiler" in info and info["torch_version"]
    has_cuda_library = any(path.name.startswith("_cuda") for path in LIBRARIES)
    assert bool(info["cuda_version"]) == has_cuda_library
    # Off for a reason, or on: then the operators are registered for CUDA, with or without a GPU here.
    registered = torch._C._dispatch_has_kernel_for_dispatch_key("vitadapter::adapter_forward", "CUDA")
    assert registered == (info["cuda_off_reason"] == "") == _library.has_kernels("cuda")


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.split(".")[0])
def test_no_symbol_outside_the_stable_abi(library):
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    unstable = re.findall(r"\b(?:_Z\w*?N(?:2at|3c10|5torch)|THP)\w*", symbols.stdout)
    assert "aoti_torch" in symbols.stdout and not unstable


@pytest.mark.skipif(bool(va.build_info()["cuda_off_reason"]), reason="the CUDA library is not loaded")
def test_the_plan_of_the_cuda_kernels_can_be_chosen_without_a_gpu():
    torch.ops.vitadapter.use_cuda_plan(64, 1)
    torch.ops.vitadapter.use_cuda_plan(0, -1)
    with pytest.raises(RuntimeError, match="tile_rows is 7, keep 2 and slices 0; accepted are"):
        torch.ops.vitadapter.use_cuda_plan(7, 2)


def test_importing_is_light():
    code = "import sys, vitadapter_ext; print({'timm', 'sklearn', 'matplotlib', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def run_at_level(level: str, code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"VITADAPTER_CPU": level}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_an_unknown_cpu_level_is_refused():
    run = run_at_level("avx1024", "import vitadapter_ext")
    has = ", ".join(va._C.cpu_levels())
    assert run.returncode and f"VITADAPTER_CPU is 'avx1024', but this machine has: {has}\n" in run.stderr


@pytest.mark.parametrize("level", ["portable", ""])
def test_the_environment_chooses_the_cpu_level(level):
    code = """
import torch, vitadapter_ext as va
assert va.FusedAdapter(8, 2)(torch.ones(3, 8)).shape == (3, 8)
print(va.build_info()["cpu_level"])"""
    # Set to nothing, it chooses nothing.
    assert run_at_level(level, code).stdout.strip() == (level or va._C.cpu_levels()[-1])


@pytest.fixture
def plan(tmp_path):
    """Runs a copy of setup.py as far as its plan; the header that it writes stays out of this build."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "vitadapter_ext").mkdir()
    shutil.copy(ROOT / "vitadapter_ext" / "__init__.py", tmp_path / "vitadapter_ext")

    def run(**environment: str) -> str:
        run = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        return run.stdout + run.stderr

    return run


def test_without_a_compiler_a_sentence_says_what_to_install(plan, tmp_path):
    (tmp_path / "bin").mkdir()
    assert "no C++ compiler was found; install g++" in plan(PATH=str(tmp_path / "bin"), CXX="")
    assert "CXX names 'no-such-compiler', which is not there" in plan(CXX="no-such-compiler")


def test_cuda_is_left_out_or_insisted_on(plan):
    assert "CPU kernels only: built with VITADAPTER_CUDA=0" in plan(VITADAPTER_CUDA="0")
    if torch.version.cuda is None:
        assert "VITADAPTER_CUDA=1, but CUDA cannot be built: built with a torch that has no CUDA" in plan(
            VITADAPTER_CUDA="1"
        )


@pytest.mark.skipif(not va.build_info()["cuda_version"], reason="no CUDA toolkit was found by the build")
def test_a_folder_with_only_a_wrapper_of_nvcc_is_no_toolkit(plan, tmp_path):
    (tmp_path / "wrapper" / "bin").mkdir(parents=True)
    (tmp_path / "wrapper" / "bin" / "nvcc").write_text("#!/bin/sh\n")
    said = plan(CUDA_HOME=str(tmp_path / "wrapper"), TORCH_CUDA_ARCH_LIST="9.0")
    assert f"from {va.build_info()['cuda_toolkit']} for 9.0" in said
