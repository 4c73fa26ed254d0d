"""Side by side with the peers, beyond what `isotone distzo2 bench` runs."""
