import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.quamba2 import method


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=9))
def test_equals_the_reference(values):
    assert method(torch.tensor(values)).tolist() == reference.method(values)
