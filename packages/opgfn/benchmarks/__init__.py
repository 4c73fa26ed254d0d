"""Side by side with the peers: `isotone opgfn bench` runs it all (`src/isotone/opgfn/bench.py`)."""
