"""Side by side with the peers: `isotone transform-once bench`."""
