import jax.numpy as jnp
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.concrete_tickets import method


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_equals_the_reference(values):
    assert method(jnp.array(values)).tolist() == reference.method(values)
