"""Side by side with the peers, beyond what `isotone swiftkv bench` runs."""
