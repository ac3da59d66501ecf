"""What do the tests of every op share? An op beside its reference and plain PyTorch, its random arguments run through
each of them, and the two ways to compare: in float64, and by accuracy in any mix of dtypes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.conftest import assert_as_good_as_eager

LOW = (torch.bfloat16, torch.float16)


class Op(NamedTuple):
    name: str
    function: Callable
    reference: Callable
    eager: Callable  # what a user would write with PyTorch: every product in the compute dtype
    make: Callable  # of (shape of x, rank, dtype=, device=): fresh random arguments that require gradients
    probabilities: tuple[str, ...]  # of dropout, by name


def tensors_of(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def converted(arguments: dict, convert) -> dict:
    """The same arguments with every tensor replaced by a fresh leaf."""
    return {
        k: convert(v.detach()).clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }


def detached(arguments: dict) -> dict:
    return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def run(op, arguments: dict, grad: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of all tensors, by name."""
    y = op(**arguments, **options)
    names, tensors = zip(*tensors_of(arguments).items(), strict=True)
    return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, tensors, grad.to(y.dtype)), strict=True))}


def check_float64(op: Op, arguments: dict, **options) -> None:
    """Ours equals the reference, with all gradients; and without gradients it has the same bits."""
    with torch.no_grad():
        grad = torch.randn_like(op.reference(**arguments, **options))
    ours, exact = run(op.function, arguments, grad, **options), run(op.reference, arguments, grad, **options)
    for name, value in exact.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        assert torch.equal(op.function(**arguments, **options), ours["y"]), "without gradients the same bits"


def check_accuracy(op: Op, make: Callable[[], dict], dtypes=None, default=torch.float32, draws=1, **options) -> None:
    """Ours, eager and float64 on the same numbers, each argument in its own dtype (`dtypes`, else `default`)."""
    results = [], [], []
    for _ in range(draws):
        arguments = {
            k: v.detach().to((dtypes or {}).get(k, default)).requires_grad_() if isinstance(v, torch.Tensor) else v
            for k, v in make().items()
        }
        with torch.no_grad():
            grad = torch.randn_like(op.reference(**arguments))
        wide = converted(arguments, torch.Tensor.double)
        exact_options = {k: v for k, v in options.items() if k != "compute_dtype"}
        results[0].append(run(op.function, arguments, grad, **options))
        results[1].append(run(op.eager, arguments, grad, **options))
        results[2].append(run(op.reference, wide, grad, **exact_options))
    assert_as_good_as_eager(*results)


def short(dtype) -> str:
    return str(dtype).removeprefix("torch.")
