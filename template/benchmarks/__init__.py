"""Side by side with the peers, beyond what `isotone __NAME__ bench` runs. FILL"""
