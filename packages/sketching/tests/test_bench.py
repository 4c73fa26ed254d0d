"""Every row of the bench at tiny sizes."""

import pytest

from isotone.sketching import bench


@pytest.mark.slow  # a quick test of some rows is beside the kernels
def test_every_row_of_the_bench():
    rows = bench.transform_rows(8, "cuda", 6) + bench.countsketch_rows(9, "cpu", 6) + bench.peer_rows(20, "cpu", 6)
    rows += bench.simulation_rows(3, "cpu", 6) + bench.overhead_rows(16, "cpu", 6) + bench.bytes_rows()
    ids = {row.id for row in rows} - {"simulation-flower"}
    assert ids == {
        "fwht",
        "countsketch-stream",
        "countsketch-scipy",
        "simulation-loop",
        "overhead-srht-4",
        "overhead-countsketch-4",
        "overhead-srht-1",
        "overhead-countsketch-1",
        "bytes-up",
    }
    assert all(row.ours_value > 0 and row.peer_value > 0 for row in rows)
