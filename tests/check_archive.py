"""Does a wheel or an sdist hold what it needs, and nothing that it must not? `python -m tests.check_archive FILE`."""

import sys
import tarfile
import zipfile
from pathlib import Path

from vitadapter_ext import build_info

WEIGHTS = ["vitadapter_ext/assets/embedded_vit.safetensors", "vitadapter_ext/assets/embedded_vit.sha256"]
SOURCES = ["csrc/common/adapter.h", "csrc/cuda/adapter_simple.cu", "csrc/cuda/nvcc_with_report.sh", "CMakeLists.txt"]
SOURCES += ["Makefile", "pyproject.toml"]
LIMIT_MB = 10


def main(archive: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
        required, forbidden = WEIGHTS, ("csrc/", "tests/", "benchmarks/")
        libraries = ["_C", "_cuda"] if build_info()["cuda_version"] else ["_C"]
        for library in libraries:
            found = any(name.startswith(f"vitadapter_ext/{library}.") for name in names)
            assert found, f"the wheel lacks the library {library}"
    else:
        with tarfile.open(archive) as tar:
            names = [name.split("/", 1)[-1] for name in tar.getnames()]
        required, forbidden = WEIGHTS + SOURCES, ("build/", ".venv/", "vitadapter_ext/_C", "vitadapter_ext/_cuda")
    missing = [name for name in required if name not in names]
    extra = [name for name in names if name.startswith(forbidden)]
    size = archive.stat().st_size / 1e6
    assert not missing and not extra and size <= LIMIT_MB, f"{archive}: missing {missing}, extra {extra}, {size:.1f} MB"
    print(f"{archive.name}: {len(names)} files, {size:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
