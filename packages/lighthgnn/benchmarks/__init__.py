"""Side by side with the peers: all of it is in `isotone lighthgnn bench`."""
