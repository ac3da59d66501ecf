"""Is ptxas' report read, judged and compared with the committed table as `make resources` says?"""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import resources

# Of nvcc 13.0 and `-Xptxas -v`, for two architectures; the last function of each is called by the kernel above it.
SM_80 = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10vitadapter4cuda6kernelINS0_39_GLOBAL__N__770b88ca_7_tiny_cu_0c8d594e7\
ForEachINS2_3SumIdEEEEEEvT_' for 'sm_80'
ptxas info    : Function properties for _ZN10vitadapter4cuda6kernelINS0_39_GLOBAL__N__770b88ca_7_tiny_cu_0c8d594e7\
ForEachINS2_3SumIdEEEEEEvT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 360 bytes cmem[0]
ptxas info    : Compile time = 1.608 ms
ptxas info    : Compiling entry function '_ZN10vitadapter4cuda6kernelINS0_7ForwardINS0_8BFloat16ELi64EEEEEvT_' for \
'sm_80'
ptxas info    : Function properties for _ZN10vitadapter4cuda6kernelINS0_7ForwardINS0_8BFloat16ELi64EEEEEvT_
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 1.812 ms
ptxas info    : Function properties for _ZN10vitadapter4cuda4slowEPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
SM_100 = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10vitadapter4cuda6kernelINS0_39_GLOBAL__N__770b88ca_7_tiny_cu_0c8d594e7\
ForEachINS2_3SumIdEEEEEEvT_' for 'sm_100'
ptxas info    : Function properties for _ZN10vitadapter4cuda6kernelINS0_39_GLOBAL__N__770b88ca_7_tiny_cu_0c8d594e7\
ForEachINS2_3SumIdEEEEEEvT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 1.903 ms
ptxas info    : Compiling entry function '_ZN10vitadapter4cuda6kernelINS0_7ForwardINS0_8BFloat16ELi64EEEEEvT_' for \
'sm_100'
ptxas info    : Function properties for _ZN10vitadapter4cuda6kernelINS0_7ForwardINS0_8BFloat16ELi64EEEEEvT_
    160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 2.448 ms
ptxas info    : Function properties for _ZN10vitadapter4cuda4slowEPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
NVCC = "Cuda compilation tools, release 13.0, V13.0.88\n"
COMPLETE = SM_80 + SM_80.replace("sm_80", "sm_90") + SM_100 + NVCC
WELL = "resources: of 6 kernels × architectures 0 spill and 3 have a stack frame\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command on one source's report, in a folder of its own: (exit status, what it printed)."""
    monkeypatch.setattr(resources, "SOURCES", tmp_path)
    monkeypatch.setattr(resources, "TABLE", tmp_path / "resources.md")
    (tmp_path / "tiny.cu").touch()
    (tmp_path / "tiny.o").touch()

    def run(report: str | None, *options: str) -> tuple[int, str]:
        if report is not None:
            (tmp_path / "tiny.ptxas.txt").write_text(report)
        monkeypatch.setattr(sys, "argv", ["resources", "--reports", str(tmp_path), *options])
        try:
            status = resources.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


def test_a_report_is_read():
    each, forward = (k._replace(name=resources.readable(resources.demangled([k.name])[0])) for k in _parse(SM_80))
    assert each == resources.Kernel("tiny.cu", "ForEach<Sum<double>>", "sm_80", registers=10, constant=360)
    memory = {"shared": 256, "constant": 368, "stack": 160}
    assert forward == resources.Kernel("tiny.cu", "Forward<BFloat16, 64>", "sm_80", registers=14, **memory)
    assert [(k.arch, k.registers, k.constant) for k in _parse(SM_100)] == [("sm_100", 10, None), ("sm_100", 14, None)]
    assert _parse(SM_80.replace("368 bytes cmem[0]", "368 bytes cmem[0], 8 bytes cmem[2]"))[1].constant == 376
    assert _parse("ptxas info    : 0 bytes gmem\n" + NVCC) == []


def _parse(report: str) -> list[resources.Kernel]:
    return resources.parse(report, "tiny.cu")


def test_a_called_function_spills_for_its_kernel():
    spilling = "Function properties for slow\n    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
    assert [k.spills for k in _parse(SM_80 + spilling)] == ["0", "4 stored, 8 loaded"]


@pytest.mark.parametrize(
    "name",
    [
        "void vitadapter::cuda::kernel<vitadapter::cuda::(anonymous namespace)::A<vitadapter::cuda::B<float, 64, true> "
        "> >(vitadapter::cuda::(anonymous namespace)::A<vitadapter::cuda::B<float, 64, true> >)",
        "void vitadapter::cuda::for_each_kernel<vitadapter::cuda::<unnamed>::A<vitadapter::cuda::B<float, (int)64, "
        "(bool)1>>>(long, T1)",
    ],
)
def test_names_are_readable_and_the_same_from_both_tools(name):
    assert resources.readable(name) == "A<B<float, 64, true>>"


def test_other_names_are_left():
    assert resources.readable("vitadapter::cuda::fill(float*, int)") == "fill"
    assert resources.readable("A<(vitadapter::DType)1>") == "A<(DType)1>"


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "warps"),
    [
        ("sm_80", 256, 32, 0, 64),  # 8 blocks of 8 warps
        ("sm_80", 32, 16, 0, 32),  # no more than 32 blocks
        ("sm_90", 256, 40, 0, 48),  # 1,280 registers a warp: 12 in each partition of 16,384, not 51 in 65,536
        ("sm_80", 256, 65, 0, 24),  # 72 as they are given out: 2,304 a warp, 7 in each partition, 28 warps, 3 blocks
        ("sm_100", 96, 255, 0, 6),  # 8,192 a warp: 8 warps, 2 blocks of 3
        ("sm_80", 128, 32, 48 << 10, 12),  # 49 KB each: 3 blocks in 164 KB
        ("sm_90", 128, 32, 48 << 10, 16),  # and 4 in 228 KB
        ("sm_90", 128, 32, 227 << 10, 4),  # all of it
        ("sm_80", 128, 32, 164 << 10, 0),  # more than there is
        ("sm_100", 1024, 72, 0, 0),  # 32 warps of 2,304 registers: more than there are
    ],
)
def test_occupancy(arch, threads, registers, shared, warps):
    assert resources.occupancy(arch, threads, registers, shared) == warps / 64


def test_the_table_has_launches_where_they_are_known(run, tmp_path):
    launch = {arch: {"threads": 128, "shared": 48 << 10} for arch in resources.SHARED}
    (tmp_path / "launches.json").write_text(json.dumps({"Forward<BFloat16, 64>": launch}))
    options = ["--launches", str(tmp_path / "launches.json")]
    assert run(COMPLETE, *options)[0] == 0
    text = (tmp_path / "resources.md").read_text()
    assert "- command: make resources\n- nvcc: 13.0.88\n" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == resources.HEADER and len(rows) == 2 + 6
    each, *_, forward = (" ".join(row[1:]) for row in rows[2:])
    assert each == "`ForEach<Sum<double>>` sm_80 10 0 256* 0* 100 % 360 0 0"
    assert forward == "`Forward<BFloat16, 64>` sm_100 14 256 128 49152 25 % – 160 0"
    # The table that the same command wrote passes; without the launches it is another one.
    assert run(None, *options, "--check") == (0, WELL)
    status, said = run(None, "--check")
    assert status == 1 and "old one" in said and "Forward<BFloat16, 64> on sm_80" in said and "ForEach" not in said


def test_a_spill_fails_and_is_named(run):
    before, place, after = COMPLETE.rpartition("160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads")
    spilling = before + place.replace("0 bytes spill", "12 bytes spill") + after
    assert run(spilling)[0] == 0  # the table is written as things are, and the check fails
    status, said = run(None, "--check")
    assert status == 1 and "Forward<BFloat16, 64> on sm_100 spills registers: 12 stored, 12 loaded" in said
    assert "ForEach" not in said and "sm_80" not in said


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_a_missing_architecture_is_no_table(run, tmp_path, options):
    status, said = run(SM_80 + SM_100 + NVCC, *options)
    assert status == 2 and not (tmp_path / "resources.md").exists() and "TORCH_CUDA_ARCH_LIST" in said
    assert "sm_90 is missing for ForEach<Sum<double>>, Forward<BFloat16, 64>\n" in said
    assert "sm_80 is missing" not in said
    status, said = run(COMPLETE + SM_80.replace("7ForEach", "7ForSome"), *options)
    assert status == 2 and all(f"{arch} is missing for ForSome<Sum<double>>\n" in said for arch in ("sm_90", "sm_100"))


def test_other_architectures_are_left_out(run):
    run(COMPLETE)
    assert run(COMPLETE + SM_80.replace("sm_80", "sm_75"), "--check") == (0, WELL)


def test_an_old_table_fails(run):
    status, said = run(COMPLETE, "--check")
    assert status == 1 and "there is no committed table, `make resources` writes it\n" in said
    assert run(COMPLETE)[0] == 0
    status, said = run(COMPLETE.replace("256 bytes smem\n", "512 bytes smem\n"), "--check")  # on sm_100 alone
    assert status == 1 and "writes it anew: Forward<BFloat16, 64> on sm_100\n" in said


def test_of_another_nvcc_only_spills_are_compared(run):
    run(COMPLETE)
    other = COMPLETE.replace("Used 14", "Used 16").replace("13.0.88", "13.1.80")
    status, said = run(other, "--check")
    assert status == 0 and "is of nvcc 13.0.88, the reports of 13.1.80: only spills are compared\n" in said
    status, said = run(other.replace("0 bytes spill loads", "4 bytes spill loads"), "--check")
    assert status == 1 and "ForEach<Sum<double>> on sm_80 spills" in said and "old one" in said


def test_without_reports_a_sentence_says_what_writes_them(run, tmp_path):
    status, said = run(None)
    assert status == 2 and f"{tmp_path} has no report, or an old one, of tiny.cu; make it with `rm" in said
    assert not (tmp_path / "resources.md").exists()


def test_an_old_report_is_none(run, tmp_path):
    assert run(COMPLETE)[0] == 0
    os.utime(tmp_path / "tiny.o", (2e9, 2e9))  # compiled anew, and not through make
    status, said = run(None)
    assert status == 2 and "has no report, or an old one, of tiny.cu" in said
    (tmp_path / "tiny.o").unlink()
    assert run(None)[0] == 2


def test_a_warning_fails(run):
    run(COMPLETE)
    status, said = run(COMPLETE + "tiny.cu(3): warning #177-D: variable was never used\n", "--check")
    assert status == 1 and "resources: nvcc says: tiny.cu(3): warning #177-D: variable" in said


@pytest.mark.parametrize("status", [0, 1])
def test_the_compiler_leaves_a_report_beside_the_object(tmp_path, status):
    home = tmp_path / "the toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "said").write_text(SM_80)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"""#!/bin/sh
if [ "$1" = --version ]; then echo '{NVCC.strip()}'; exit; fi
for argument; do echo "$argument"; done > "$CUDA_HOME/arguments"
cat "$CUDA_HOME/said" >&2
exit {status}
""")
    nvcc.chmod(0o755)
    options = ["-O3", "-c", "a folder/tiny.cu", "-o", f"{home}/tiny.o", "-std=c++20"]
    command = ["sh", resources.SOURCES / "nvcc_with_report.sh", *options]
    run = subprocess.run(command, env=os.environ | {"CUDA_HOME": str(home)}, capture_output=True, text=True)
    assert run.returncode == status and (home / "arguments").read_text().splitlines() == [*options, "-Xptxas", "-v"]
    assert run.stdout == (SM_80 if status else "")
    reports = {path.name: path.read_text() for path in home.glob("*.txt*")}
    assert reports == ({} if status else {"tiny.ptxas.txt": SM_80 + NVCC})
