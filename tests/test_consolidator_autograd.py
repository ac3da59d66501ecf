"""Does the `consolidator` op live well with autograd, autocast and `torch.compile`?"""

import pytest
import torch

from tests.consolidator_problems import CONSOLIDATOR, make, make_branches
from tests.problems import LOW, detached, run, short, tensors_of
from vitadapter_ext.ops import consolidator


def raw_arguments(arguments, seed=None, drop_path=0.0, samples=None):
    """Of the raw op, and the dtype of its products."""
    weights = [t for name, t in arguments.items() if name.startswith("weights[")]
    biases = [t for name, t in arguments.items() if name.startswith("biases[")]
    settings = (seed, True, drop_path, samples, arguments["x"].dtype)
    return arguments["x"], arguments["base"], weights, biases, *settings


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_gradcheck(plain_device, shuffle, drop_path):
    arguments = make_branches(6, 12, (3, 2), (4, 2), device=plain_device)
    seed = torch.tensor([5], device=plain_device)

    def op(*tensors):
        named = dict(zip(tensors_of(arguments), tensors, strict=True))
        return CONSOLIDATOR.function(**(arguments | named), shuffle=shuffle, drop_path=drop_path, seed=seed)

    assert torch.autograd.gradcheck(op, tuple(tensors_of(arguments).values()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_opcheck(plain_device, bias, dtype):
    arguments = detached(make_branches(12, 24, (3, 2), (4, 2), device=plain_device, dtype=dtype, bias=bias, base=bias))
    x, base, weights, biases, *settings = raw_arguments(arguments, torch.tensor([3], device=plain_device), 0.1, 2)
    torch.library.opcheck(torch.ops.vitadapter.consolidator_forward.default, (x, base, weights, biases, *settings))
    grad = x.new_ones(4, 2, 24)
    onto = x if bias else None
    backward = (grad, x, onto, weights, biases, *settings, 0b1111 if bias else 0b0011)
    torch.library.opcheck(torch.ops.vitadapter.consolidator_backward.default, backward)
    arguments = (x.new_ones(24, 12), weights, True, dtype)
    torch.library.opcheck(torch.ops.vitadapter.consolidator_weight.default, arguments)


@pytest.mark.parametrize("needs", range(16), ids="{:04b}".format)
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_gradients_that_are_not_asked_for_come_back_empty(device, needs, drop_path):
    arguments = detached(make((40, 24), 4, device=device, dtype=torch.float32))
    x, _, weights, biases, *settings = raw_arguments(arguments, torch.tensor([3], device=device), drop_path)
    backward = torch.ops.vitadapter.consolidator_backward.default
    grad = torch.randn_like(x)
    every = backward(grad, x, None, weights, biases, *settings, 0b1111)
    some = backward(grad, x, None, weights, biases, *settings, needs)
    bits = [0, 3, *[1] * len(weights), *[2] * len(biases)]
    for bit, one, all_together in zip(bits, some, every, strict=True):
        assert torch.equal(one, all_together) if needs >> bit & 1 else one.numel() == 0
    torch.testing.assert_close(every[1], grad.sum(0))
    # What the gradient of x is added to.
    onto = torch.randn_like(x)
    added = backward(grad, x, onto, weights, biases, *settings, 1)[0]
    torch.testing.assert_close(added, onto + every[0])


@pytest.mark.parametrize("low", LOW, ids=short)
def test_autocast_gives_the_compute_dtype(device, low):
    a = detached(make(device=device, dtype=torch.float32)) | {"base": None}
    with torch.autocast(device, dtype=low):
        y = CONSOLIDATOR.function(**a)
        assert y.dtype == torch.float32 and torch.equal(y, CONSOLIDATOR.function(**a, compute_dtype=low))
        assert CONSOLIDATOR.function(**a | {"base": y.to(low)}).dtype == low
    assert not torch.equal(y, CONSOLIDATOR.function(**a))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_it_compiles_whole(drop_path):
    arguments = make(dtype=torch.float32)
    compiled = torch.compile(CONSOLIDATOR.function, fullgraph=True)
    options = {"drop_path": drop_path, "seed": torch.tensor([4])}
    grad = torch.randn(2, 5, 24)
    ours, theirs = (run(f, arguments, grad, **options) for f in (CONSOLIDATOR.function, compiled))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, msg=name)


def test_seeds_come_from_the_generator(device):
    a = detached(make((64, 24), 6, dtype=torch.float32, device=device))
    torch.manual_seed(1)
    first, second = (CONSOLIDATOR.function(**a, drop_path=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(CONSOLIDATOR.function(**a, drop_path=0.5), first) and not torch.equal(first, second)
    generator = torch.cuda if device == "cuda" else torch
    state = generator.get_rng_state()
    CONSOLIDATOR.function(**a)
    assert torch.equal(generator.get_rng_state(), state), "nothing is drawn"


def test_nan_and_infinity_stay_in_their_rows_and_groups(device):
    x = torch.zeros(40, 8, device=device)
    x[1, 3], x[35, 0] = float("nan"), float("inf")
    y = consolidator(x, [torch.ones(8, 2, device=device)], shuffle=False)
    assert y[1].isnan().tolist() == [False, False, True, True, False, False, False, False]
    assert y[35].isinf().tolist() == [True, True] + [False] * 6
    assert not y[[0, *range(2, 35), *range(36, 40)]].any()
