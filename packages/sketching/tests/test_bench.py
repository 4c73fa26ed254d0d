"""Embeddings against theory, and every row of the bench, at tiny sizes."""

import jax
import pytest

from isotone.sketching import bench
from isotone.sketching.embedding import measure_embedding
from isotone.sketching.sketches import make_sketch


@pytest.mark.parametrize("kind", ["srht", "countsketch", "gaussian"])
def test_embeddings_are_the_theorys(kind):
    """1 + alpha within 4 standard errors of 2,000 draws, the constant at most 2: a right sketch fails in 1 of 5,000."""
    found = measure_embedding(make_sketch(kind, 32, 8), 2000, jax.random.key(0))
    assert abs(found.alpha - found.alpha_theory) < 4 * found.alpha_error
    assert found.a - 4 * found.a_error <= 2 and found.bias < 4.5


def test_every_row_of_the_bench():
    rows = bench.transform_rows(8, "cuda", 6) + bench.countsketch_rows(9, "cpu", 6) + bench.peer_rows(12, "cpu", 6)
    rows += bench.simulation_rows(3, "cpu", 6) + bench.overhead_rows(16, "cpu", 6) + bench.bytes_rows()
    ids = {row.id for row in rows} - {"simulation-flower"}
    assert ids == {
        "fwht",
        "countsketch-stream",
        "countsketch-scipy",
        "simulation-loop",
        "overhead-srht",
        "overhead-countsketch",
        "bytes-up",
    }
    assert all(row.ours_value > 0 and row.peer_value > 0 for row in rows)
