"""Does a GPU get the kernels only where the library was built for it? With GPUs that are made up."""

import importlib
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.adapter_problems import make
from vitadapter_ext import _library, reference
from vitadapter_ext._library import code_for
from vitadapter_ext.ops import adapter

DEFAULT = "8.0;9.0;10.0+PTX"  # of setup.py

# (architectures, what runs it, what does not)
RUNS = [
    (DEFAULT, [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 1)], [(7, 0), (7, 5)]),
    ("9.0", [(9, 0)], [(8, 0), (8, 9), (10, 0), (12, 0)]),
    ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
    ("8.0+PTX", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
    ("9.0a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
    ("9.0a+PTX", [(9, 0)], [(10, 0)]),
    ("10.0f", [(10, 0), (10, 3)], [(9, 0), (11, 0), (12, 0)]),
    ("10.3f+PTX", [(10, 3)], [(10, 0), (12, 0)]),
    ("7.5 8.0 9.0a", [(7, 5), (8, 0), (8, 6), (9, 0)], [(7, 0), (10, 0)]),
    ("8.0; 9.0;", [(8, 0), (9, 0)], [(10, 0)]),
    ("Hopper", [(9, 0), (10, 0)], [(8, 9)]),
    ("Ampere;Hopper", [(8, 0), (8, 6), (9, 0), (12, 0)], [(7, 5)]),
    ("Ampere+Tegra", [(8, 7), (8, 9)], [(8, 0), (8, 6), (9, 0)]),
    ("Turing", [(7, 5), (8, 0), (9, 0)], [(7, 0)]),
    ("12.0", [(12, 0), (12, 1)], [(10, 0), (11, 0)]),
    ("native", [(7, 5), (9, 0)], []),
]


@pytest.mark.parametrize(("architectures", "runs", "does_not"), RUNS, ids=[row[0] for row in RUNS])
def test_what_runs_what_was_built(architectures, runs, does_not):
    assert [gpu for gpu in runs if code_for(architectures, gpu) is None] == []
    assert [gpu for gpu in does_not if code_for(architectures, gpu)] == []


def test_the_latest_code_that_fits_is_run():
    assert code_for(DEFAULT, (8, 9)) == (8, 0)
    assert code_for(DEFAULT, (9, 0)) == (9, 0)
    assert code_for(DEFAULT, (12, 0)) == (10, 0)
    assert code_for("7.5+PTX;9.0", (8, 0)) == (7, 5)
    assert code_for("9.0", (8, 0)) is None


@pytest.mark.parametrize("name", _library._NAMED_ARCHITECTURES)
def test_names_are_torchs(name, monkeypatch):
    from torch.utils import cpp_extension

    def flags(architectures):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        return cpp_extension._get_cuda_arch_flags()

    try:
        torchs = flags(name)
    except ValueError:
        pytest.skip(f"this torch does not know {name}")
    assert torchs == flags(_library._NAMED_ARCHITECTURES[name])


@pytest.fixture
def gpu(monkeypatch):
    """Makes up a GPU and a library that was built for some architectures."""

    def make_up(capability, architectures=DEFAULT, off=""):
        built = _library._C.build_info() | {"cuda_architectures": architectures}
        monkeypatch.setattr(_library._C, "build_info", lambda: built)
        monkeypatch.setattr(_library, "CUDA_OFF_REASON", off)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made-Up GPU")

    monkeypatch.setattr(_library, "_has_kernels", {})
    _library.warn_without_kernels.cache_clear()
    yield make_up
    _library.warn_without_kernels.cache_clear()


CUDA0 = torch.device("cuda", 0)


def test_a_gpu_that_was_built_for_has_kernels_without_a_word(gpu):
    gpu((9, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _library.has_kernels(CUDA0) and _library.has_kernels("cuda")


def test_a_gpu_that_was_not_built_for_is_named_once(gpu):
    gpu((7, 5))
    assert not _library.has_kernels(CUDA0)
    assert _library.has_kernels("cuda"), "they are loaded, for other GPUs"
    with pytest.warns(UserWarning) as caught:
        _library.warn_without_kernels(CUDA0)
        _library.warn_without_kernels(CUDA0)
    assert [str(warning.message) for warning in caught] == [
        "vitadapter_ext runs plain PyTorch instead of its kernels on 'Made-Up GPU' (compute capability 7.5): "
        "they are built for 8.0;9.0;10.0+PTX"
    ]


@pytest.mark.parametrize(("capability", "architectures"), [((7, 5), "7.5;8.0"), ((8, 6), "7.5+PTX")])
def test_a_gpu_with_the_simple_kernels_alone_is_named_once(gpu, capability, architectures):
    gpu(capability, architectures)
    with pytest.warns(UserWarning, match="runs its simple kernels on 'Made-Up GPU'") as caught:
        assert _library.has_kernels(CUDA0)
        assert _library.has_kernels(CUDA0)
    assert len(caught) == 1 and f"built for {architectures}" in str(caught[0].message)


def test_without_the_library_the_reason_is_the_librarys(gpu):
    gpu((9, 0), off="built with VITADAPTER_CUDA=0")
    assert not _library.has_kernels(CUDA0) and not _library.has_kernels("cuda")
    with pytest.warns(UserWarning, match="on 'cuda': built with VITADAPTER_CUDA=0"):
        _library.warn_without_kernels(CUDA0)


def test_other_devices_are_not_asked_for_a_capability(gpu, monkeypatch):
    gpu(None)
    answers = {name: _library.has_kernels(torch.device(name)) for name in ("cpu", "meta", "mps")}
    assert answers == {"cpu": True, "meta": True, "mps": False}


def test_fake_tensors_on_a_gpu_that_is_not_there(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, device="cuda:0")
        y = adapter(x, torch.empty(4, 8, device="cuda:0"), torch.empty(8, 4, device="cuda:0"))
    assert (y.shape, y.device) == (x.shape, x.device)


@pytest.mark.parametrize("has", [True, False])
def test_a_trace_asks_once_and_does_not_break(monkeypatch, has):
    asked = []

    def find(device):
        asked.append(device)
        print("asked")  # a break of the graph that it were traced into
        return has

    monkeypatch.setattr(_library, "_has_kernels", {})
    monkeypatch.setattr(_library, "_find_kernels", find)
    ops = importlib.import_module("vitadapter_ext.ops.adapter")
    monkeypatch.setattr(ops, "_forward", ops._forward if has else None)
    arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in make().items()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda: adapter(**arguments), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(), reference.adapter(**arguments))
    assert asked == [torch.device("cpu")]
