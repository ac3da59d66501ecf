"""Is the reference right? Against numbers worked out by hand and the published answers of Philox."""

import itertools

import pytest
import torch

from vitadapter_ext import reference


def test_reference_on_numbers_worked_out_by_hand():
    # hidden = relu([1·1 + 2·3 - 8, 1·2 - 2·1 + 1]) = relu([-1, 1]) = [0, 1]; out = [5, 7] + [1, -1] = [6, 6]
    y = reference.adapter(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 3.0], [2.0, -1.0]]),
        torch.tensor([[4.0, 5.0], [6.0, 7.0]]),
        down_bias=torch.tensor([-8.0, 1.0]),
        up_bias=torch.tensor([1.0, -1.0]),
        scale=torch.tensor([0.5, 2.0]),
        residual=torch.tensor([[10.0, 20.0]]),
        activation="relu",
    )
    assert y.tolist() == [[13.0, 32.0]]


def test_arc_on_numbers_worked_out_by_hand():
    # (x·U) ∘ λ = [1·1 + 2·3, 1·2 - 2·1] ∘ [2, 5] = [14, 0]; times Uᵀ = [14·1, 14·3] = [14, 42]
    y = reference.arc(
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1.0, 2.0], [3.0, -1.0]]),
        torch.tensor([2.0, 5.0]),
        bias=torch.tensor([0.5, -0.5]),
    )
    assert y.tolist() == [[15.5, 43.5]]


def test_consolidator_on_numbers_worked_out_by_hand():
    # Two groups of two: the shuffle makes x (1, 2, 3, 4) → (1, 3, 2, 4), so the first output sees 1 and 3, the second
    # 2 and 4. Without it they see 1 and 2, 3 and 4.
    x, weight, bias = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0, 10], [2, 20]]), torch.tensor([0.5, 0])
    y = reference.consolidator(x, [weight], [bias], base=torch.tensor([[100.0, 200]]))
    assert y.tolist() == [[100 + 1 + 30 + 0.5, 200 + 4 + 80]]
    assert reference.consolidator(x, [weight], shuffle=False).tolist() == [[1 + 20, 6 + 80]]
    # Six inputs in two groups of three: (0 1 2 / 3 4 5) transposed is 0 3 1 4 2 5.
    assert reference.shuffled(torch.arange(6), 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert reference.consolidated_weight(torch.ones(2, 4), [weight]).tolist() == [[2, 1, 11, 1], [1, 3, 1, 21]]


def test_every_branch_of_every_sample_is_dropped_on_its_own():
    x, seed = torch.ones(200, 3, 4), torch.tensor([9])
    weights = [torch.full((4, 2), 0.5), torch.full((4, 1), 10.0)]
    y = reference.consolidator(x, weights, drop_path=0.5, seed=seed)
    assert (y == y[:, :1, :1]).all(), "the rows of a sample go together"
    assert {round(v) for v in y[:, 0, 0].tolist()} == {0, 2, 20, 22}, "kept branches are doubled"


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = reference._philox4x32([torch.tensor(c) for c in counter], tuple(torch.tensor(k) for k in key))
    assert [int(word) for word in words] == expected


def test_masks_keep_the_right_share_and_streams_differ():
    seed = torch.tensor([-(2**62) + 12345])
    masks = [reference.keep_mask(seed, 400, 251, stream, 0.3) for stream in range(3)]
    for mask in masks:
        assert abs(mask.double().mean().item() - 0.7) < 0.01
    for a, b in itertools.combinations(masks, 2):
        assert abs((a == b).double().mean().item() - (0.49 + 0.09)) < 0.01
