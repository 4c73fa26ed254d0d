"""Side by side with the peers, beyond what `isotone transform-once bench` runs. FILL"""
