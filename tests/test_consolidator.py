"""Is the mathematics of the `consolidator` op right? Against the float64 reference and plain PyTorch, on every device
and at every CPU level."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.consolidator_problems import CONSOLIDATOR, make_branches
from tests.problems import LOW, check_accuracy, check_float64, short

F32 = torch.float32
# (in, out, groups): the paper's four layers with fewer rows of weights, odd sizes, one group, a group for each input.
SHAPES = [
    (96, 288, (48,)),
    (64, 256, (32, 32)),
    (256, 64, (32,)),
    (30, 42, (6,)),
    (30, 42, (3, 6, 2)),
    (45, 45, (45, 9, 1)),
    (7, 21, (1,)),
]


@pytest.mark.parametrize(("width", "out", "groups"), SHAPES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_blocks_of_rows_in_float64(plain_device, width, out, groups, shuffle, drop_path):
    arguments = make_branches(width, out, groups, (6, 13), device=plain_device)
    seed = torch.tensor([7], device=plain_device)
    check_float64(CONSOLIDATOR, arguments, shuffle=shuffle, drop_path=drop_path, seed=seed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_option_in_float64(data):
    groups = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    multiple = torch.tensor(groups).unique().prod().item()
    width, out = (multiple * data.draw(st.integers(1, 2)) for _ in range(2))
    shape = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=2))
    options = {
        "shuffle": data.draw(st.booleans()),
        "drop_path": data.draw(st.sampled_from([0.0, 0.4])),
        "seed": torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))]),
    }
    arguments = make_branches(width, out, groups, shape, bias=data.draw(st.booleans()), base=data.draw(st.booleans()))
    check_float64(CONSOLIDATOR, arguments, **options)


# (x, base, parameters, compute): what autocast and half-precision models make, one low dtype at a time.
MIXES = [(F32, F32, F32, F32)] + [
    mix
    for low in LOW
    for mix in (
        (low, low, low, low),
        (low, low, F32, low),
        (F32, low, F32, low),
        (F32, F32, low, low),
        (low, F32, F32, F32),
    )
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(short, mix)))
@pytest.mark.parametrize(("width", "out", "groups"), [SHAPES[i] for i in (0, 2, 4)])
def test_dtype_mixes_are_as_accurate_as_eager(device, mix, width, out, groups):
    x, base, parameters, compute = mix
    draw = functools.partial(make_branches, width, out, groups, (3, 37), device=device)
    check_accuracy(CONSOLIDATOR, draw, {"x": x, "base": base}, parameters, 6, compute_dtype=compute)


@pytest.mark.parametrize("dtype", [F32, *LOW], ids=short)
def test_each_parameter_in_a_dtype_of_its_own(device, dtype):
    for alone in ("base", "weights[1]", "biases[0]"):
        draw = functools.partial(make_branches, 30, 42, (3, 6), (60,), device=device)
        check_accuracy(CONSOLIDATOR, draw, {"x": dtype, alone: dtype}, F32, 6, compute_dtype=dtype)


@pytest.mark.parametrize(
    ("rows", "width", "out", "groups"),
    [(20_000, 32, 48, (16,)), (200, 1536, 384, (2,)), (200, 384, 1536, (1,))],
    ids=["rows", "wide groups", "tall groups"],
)
def test_long_sums_lose_no_accuracy(device, rows, width, out, groups):
    check_accuracy(CONSOLIDATOR, functools.partial(make_branches, width, out, groups, (rows,), device=device), draws=2)


def test_samples_may_be_several_of_the_first_dimension(device):
    """As in Swin, whose attention sees windows: an image's windows are kept or dropped together."""
    arguments = make_branches(24, 24, (6,), (12, 5), dtype=F32, device=device, base=False)
    found = CONSOLIDATOR.function(**arguments, drop_path=0.5, samples=3, seed=torch.tensor([2], device=device))
    whole = arguments | {"x": arguments["x"].reshape(3, 20, 24)}
    expected = CONSOLIDATOR.function(**whole, drop_path=0.5, seed=torch.tensor([2], device=device))
    assert torch.equal(found, expected.reshape(12, 5, 24))
    kept = found.reshape(3, -1).any(dim=1)
    assert 0 < kept.sum() < 3
