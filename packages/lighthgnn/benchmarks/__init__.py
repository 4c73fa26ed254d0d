"""Side by side with the peers, beyond what `isotone lighthgnn bench` runs. FILL"""
