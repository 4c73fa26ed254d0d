"""Side by side with the peers: `isotone concrete-tickets bench`; `nox -s "bench(concrete-tickets)"` keeps them."""
