"""Is the `adapter` op right for any shape and any combination of options? Hypothesis draws them. The CPU levels, all of
which compute in float32, meet their random problems in tests/cpp/adapter_test.cpp."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_adapter import check_options
from vitadapter_ext.ops.adapter import ACTIVATIONS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 7), min_size=0, max_size=2),
    dim=st.integers(1, 67),
    rank=st.integers(0, 21),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    scale=st.sampled_from(["channel", "scalar", 1.0, -0.3]),
    residual=st.booleans(),
    probabilities=st.tuples(*[st.sampled_from([0.0, 0.4])] * 3),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_every_option_in_float64(shape, dim, rank, activation, bias, scale, residual, probabilities, seed):
    check_options("cpu", (*shape, dim), rank, activation, bias, scale, residual, probabilities, seed)
