"""Side by side with the peers, beyond what `isotone concrete-tickets bench` runs."""
