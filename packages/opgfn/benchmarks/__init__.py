"""Side by side with the peers, beyond what `isotone opgfn bench` runs. FILL"""
