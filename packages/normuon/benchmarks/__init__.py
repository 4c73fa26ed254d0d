"""Side by side with the peers: `isotone normuon bench` runs them all; `nox -s "bench(normuon)"` keeps what it found."""
