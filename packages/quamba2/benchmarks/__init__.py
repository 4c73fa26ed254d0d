"""Side by side with the peers, beyond what `isotone quamba2 bench` runs. FILL"""
