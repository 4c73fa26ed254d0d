__IMPORT__
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from isotone.__MODULE__ import method


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=9))
def test_equals_the_reference(values):
    assert method(__MAKE__(values)).tolist() == reference.method(values)
