"""Does the `arc` op live well with autograd and autocast?"""

import pytest
import torch

from tests.arc_problems import make
from tests.problems import LOW, detached, short, tensors_of
from vitadapter_ext.ops import arc


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradcheck(plain_device, bias, dropout):
    arguments = make((2, 3, 5), 4, device=plain_device, bias=bias)
    seed = torch.tensor([5], device=plain_device)

    def op(*tensors):
        named = dict(zip(tensors_of(arguments), tensors, strict=True))
        return arc(**(arguments | named), dropout=dropout, seed=seed)

    assert torch.autograd.gradcheck(op, tuple(tensors_of(arguments).values()))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=short)
def test_opcheck(plain_device, save, bias, dtype):
    x, *operands = detached(make(device=plain_device, dtype=dtype, bias=bias)).values()
    operands.append(torch.tensor([3], device=plain_device))
    settings = (0.1, dtype, False)
    torch.library.opcheck(torch.ops.vitadapter.arc_forward.default, (x, *operands, *settings, save))
    _, hidden = torch.ops.vitadapter.arc_forward.default(x, *operands, *settings, True)
    needs = 0b1111 if save else 0b0101
    backward = (torch.randn_like(x), x, hidden, *operands, *settings, needs)
    torch.library.opcheck(torch.ops.vitadapter.arc_backward.default, backward)


@pytest.mark.parametrize("needs", range(16), ids="{:04b}".format)
def test_gradients_that_are_not_asked_for_come_back_empty(plain_device, needs):
    x, *operands = detached(make((30, 24), 5, device=plain_device)).values()
    settings = (None, 0.0, torch.float64, False)
    _, hidden = torch.ops.vitadapter.arc_forward.default(x, *operands, *settings, True)
    grad = torch.randn_like(x)
    every = torch.ops.vitadapter.arc_backward.default(grad, x, hidden, *operands, *settings, 0b1111)
    some = torch.ops.vitadapter.arc_backward.default(grad, x, hidden, *operands, *settings, needs)
    for bit, (one, all_together) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(one, all_together) if needs >> bit & 1 else one.numel() == 0


@pytest.mark.parametrize("low", LOW, ids=short)
def test_autocast_gives_the_compute_dtype(device, low):
    a = detached(make(device=device, dtype=torch.float32))
    with torch.autocast(device, dtype=low):
        y = arc(**a)
        assert y.dtype == torch.float32 and torch.equal(y, arc(**a, compute_dtype=low))
        assert arc(**a | {"x": a["x"].to(low)}).dtype == low
        assert arc(**{k: v.double() for k, v in a.items()}).dtype == torch.float64
    if (device, low) != ("cpu", torch.float16):  # the CPU reads float16 as float32
        assert not torch.equal(y, arc(**a))
