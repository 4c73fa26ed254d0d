"""Side by side with the peers: `isotone sketching bench`; `nox -s "bench(sketching)"` keeps them."""
