"""What does every CUDA kernel take of a multiprocessor? `make resources` puts ptxas' reports, which make's
build of the package leaves beside its objects, into `benchmarks/results/resources.md`; no GPU is needed.

With `--check` nothing is written: ends with 1 where a kernel spills registers, nvcc warned or the committed table is an
old one. Ends with 2 where reports or architectures are missing.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks.report import table

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "csrc" / "cuda"
TABLE = ROOT / "benchmarks" / "results" / "resources.md"

# Of one multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute
# Capability". What the three have in common comes first; shared memory (bytes) differs.
WARPS, BLOCKS, REGISTERS = 64, 32, 65_536
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
# How they are given out, from the toolkit's cuda_occupancy.h: registers to whole warps by each of four partitions,
# shared memory to whole blocks, with 1 KB more for the system.
PARTITIONS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 4, 256, 128, 1024

ASSUMED = {"threads": 256, "shared": 0}

HEADER = ["source", "kernel", "architecture", "registers", "static shared", "threads", "dynamic shared", "occupancy"]
HEADER += ["constant", "stack frame", "spills"]

_SHARED = ", ".join(f"{arch}: {size >> 10} KB" for arch, size in SHARED.items())
EXPLANATION = f"""\
- registers: of a thread
- static shared: bytes of a block; constant: bytes, parameters included; –: ptxas does not tell
- threads, dynamic shared (bytes): of a block, as it is launched for 12,608 tokens of 768; \\*: not known, taken for \
{ASSUMED["threads"]} and {ASSUMED["shared"]}
- occupancy: resident warps, of the {WARPS} that a multiprocessor has room for, as its registers ({REGISTERS:,}), shared
  memory ({_SHARED}) and blocks ({BLOCKS}) allow
- stack frame: bytes of local memory of a thread, for spills or, for example, for an array with a variable index
- spills: bytes that a thread stores to and loads from there for want of registers; `.ci/run` fails on any"""


class Kernel(NamedTuple):
    """What ptxas says of one kernel on one architecture; memory in bytes."""

    source: str  # file
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    constant: int | None = None
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0

    @property
    def spills(self) -> str:
        """The words of the table."""
        if self.spill_stores or self.spill_loads:
            return f"{self.spill_stores} stored, {self.spill_loads} loaded"
        return "0"


def parse(report: str, source: str) -> list[Kernel]:
    """The kernels of one source file, from what `nvcc -Xptxas -v` printed; names as the linker knows them."""
    kernels = []
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for '(sm_\w+)'", line):
            kernels.append(Kernel(source, *found.groups()))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # One such line of the kernel, and one of each function that it calls.
            stack, stores, loads = map(int, found.groups())
            last = kernels[-1]
            kernels[-1] = last._replace(
                stack=last.stack + stack,
                spill_stores=last.spill_stores + stores,
                spill_loads=last.spill_loads + loads,
            )
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            constant = [int(size) for size in re.findall(r"(\d+) bytes cmem", line)]
            kernels[-1] = kernels[-1]._replace(
                registers=int(found[1]),
                shared=int(shared[1]) if shared else 0,
                constant=sum(constant) if constant else None,
            )
    return kernels


def readable(name: str) -> str:
    """A demangled kernel's name as the table has it: of `void vitadapter::cuda::kernel<Body>(Body)` the Body, without
    the project's namespaces."""
    name = re.sub(r"(\(anonymous namespace\)|<unnamed>|\bvitadapter|\bcuda)::", "", name).removeprefix("void ")
    # c++filt and cu++filt write these differently.
    name = re.sub(r"\((unsigned )?(int|long)\)(?=-?\d)", "", name)
    name = re.sub(r"> (?=>)", ">", name).replace("(bool)1", "true").replace("(bool)0", "false")
    depth = 0
    for place, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:place]
            break
    generic = re.fullmatch(r"(?:for_each_)?kernel<(.+)>", name)
    return generic[1] if generic else name


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        print("resources: the kernels' names need c++filt (of binutils) or cu++filt (of CUDA), and neither was found")
        sys.exit(2)
    run = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def read_reports(folder: Path) -> tuple[list[Kernel], list[str], str]:
    """Every kernel of csrc/cuda on every architecture of SHARED, the lines in which the compiler warned, and the
    version of the nvcc that compiled them; exits with 2 where a source has no report or a kernel lacks an
    architecture."""
    again = "`rm -r build/objects; touch setup.py; make resources`, where nvcc is and torch is one for CUDA"
    texts = {source.name: _read_report(folder / source.stem) for source in sorted(SOURCES.glob("*.cu"))}
    missing = [source for source, text in texts.items() if text is None]
    if missing or not texts:
        print(f"resources: {folder} has no report, or an old one, of {_some(missing, 3)}; make it with {again}")
        sys.exit(2)
    kernels = [kernel for source, text in texts.items() for kernel in parse(text, source)]
    names = demangled([kernel.name for kernel in kernels])
    kernels = [kernel._replace(name=readable(name)) for kernel, name in zip(kernels, names, strict=True)]
    there = {(kernel.source, kernel.name, kernel.arch) for kernel in kernels}
    lacking = {arch: {k.name: k for k in kernels if (k.source, k.name, arch) not in there} for arch in SHARED}
    lacking = {arch: names for arch, names in lacking.items() if names or not kernels}
    for arch, names in lacking.items():
        print(f"resources: {arch} is missing for {_some(names)}")
    if lacking:
        print(f"resources: without TORCH_CUDA_ARCH_LIST every architecture is built; {again}")
        sys.exit(2)
    warnings = [line for text in texts.values() for line in text.splitlines() if re.search(r"\bwarning\b", line)]
    versions = {version for text in texts.values() for version in re.findall(r"release .*, V([\d.]+)", text)}
    kernels = [kernel for kernel in kernels if kernel.arch in SHARED]
    return sorted(kernels, key=_place), warnings, " and ".join(sorted(versions))


def _read_report(stem: Path) -> str | None:
    """Of the object beside it; None where there is none, or one of an object that was compiled without make since."""
    compiled, report = (stem.with_name(stem.name + suffix) for suffix in (".o", ".ptxas.txt"))
    if compiled.exists() and report.exists() and report.stat().st_mtime >= compiled.stat().st_mtime:
        return report.read_text()
    return None


def _place(kernel: Kernel) -> list:
    """Numbers in a name sort as numbers."""
    words = re.split(r"(\d+)", f"{kernel.source} {kernel.name} {kernel.arch}")
    return [int(word) if word.isdigit() else word for word in words]


def occupancy(arch: str, threads: int, registers: int, shared: int) -> float:
    """Resident warps of a multiprocessor by those it has room for, 0..1; 0 where not one block fits.

    Args:
        threads, shared: of a block; shared memory (bytes), static and dynamic.
        registers: of a thread.
    """
    warps = _round_up(threads, 32) // 32
    resident = PARTITIONS * (REGISTERS // PARTITIONS // _round_up(32 * registers, REGISTER_UNIT))
    by_shared = SHARED[arch] // _round_up(shared + SHARED_RESERVED, SHARED_UNIT)
    return min(WARPS // warps, BLOCKS, resident // warps, by_shared) * warps / WARPS


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def document(kernels: list[Kernel], nvcc: str, launches: dict[str, dict[str, dict[str, int]]]) -> str:
    """The Markdown file."""
    rows = []
    for kernel in kernels:
        known = launches.get(kernel.name, {}).get(kernel.arch)
        launch, star = known or ASSUMED, "" if known else "*"
        row = [kernel.source, f"`{kernel.name}`", kernel.arch, kernel.registers, kernel.shared]
        row += [f"{launch['threads']}{star}", f"{launch['shared']}{star}"]
        share = occupancy(kernel.arch, launch["threads"], kernel.registers, kernel.shared + launch["shared"])
        row.append(f"{100 * share:g} %")
        row += ["–" if kernel.constant is None else kernel.constant, kernel.stack, kernel.spills]
        rows.append(row)
    facts = f"- command: make resources\n- nvcc: {nvcc}\n{EXPLANATION}"
    return f"# What the CUDA kernels take\n\n{facts}\n\n{table(HEADER, rows)}\n"


def differences(committed: str, current: str) -> list[str]:
    """Sentences on where the committed file differs from what it would be now."""
    if not committed:
        return ["there is no committed table, `make resources` writes it"]
    versions = [re.search(r"^- nvcc: (.*)", text, re.M) for text in (committed, current)]
    then, now = (version[1] if version else "unknown" for version in versions)
    if then != now:
        print(f"resources: the committed table is of nvcc {then}, the reports of {now}: only spills are compared")
    rows = []
    for text in (committed, current):
        lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        rows.append({tuple(row if then == now else (*row[:3], row[-1])) for row in cells})
    changed = dict.fromkeys(f"{row[1].strip('`')} on {row[2]}" for row in sorted(rows[0] ^ rows[1]))
    if changed:
        return [f"the committed table is an old one, `make resources` writes it anew: {_some(changed)}"]
    return []


def _some(names: Iterable[str], most: int = 12) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "every kernel") + more


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path("build", "objects", "csrc", "cuda")
    parser.add_argument(
        "--reports", type=Path, default=ROOT / folder, metavar="FOLDER", help=f"of the build [{folder}]"
    )
    parser.add_argument(
        "--launches",
        type=Path,
        metavar="FILE",
        help='JSON of how kernels are launched: {"Body<float>": {"sm_90": {"threads": 128, "shared": 49152}}}',
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail on spills, warnings or an old table")
    arguments = parser.parse_args()

    kernels, warnings, nvcc = read_reports(arguments.reports)
    launches = json.loads(arguments.launches.read_text()) if arguments.launches else {}
    text = document(kernels, nvcc, {readable(name): launch for name, launch in launches.items()})
    sentences = [f"nvcc says: {line}" for line in warnings]
    sentences += [f"{k.name} on {k.arch} spills registers: {k.spills} (bytes)" for k in kernels if k.spills != "0"]
    if arguments.check:
        sentences += differences(TABLE.read_text() if TABLE.exists() else "", text)
    else:
        TABLE.write_text(text)
        print(f"written to {TABLE}")
    for sentence in sentences:
        print(f"resources: {sentence}")
    spilling = sum(kernel.spills != "0" for kernel in kernels)
    framed = sum(kernel.stack > 0 for kernel in kernels)
    print(f"resources: of {len(kernels)} kernels × architectures {spilling} spill and {framed} have a stack frame")
    return 1 if arguments.check and sentences else 0


if __name__ == "__main__":
    sys.exit(main())
