"""Molecules: the fragment vocabulary, decoding, objectives on RDKit, the sEH proxy, a pool of workers."""
