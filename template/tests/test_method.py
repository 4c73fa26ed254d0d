import reference
from hypothesis import given
from hypothesis import strategies as st

from isotone.__MODULE__ import method


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_equals_the_reference(values):
    assert method(values) == reference.method(values)
