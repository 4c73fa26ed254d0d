"""What the Isotone packages share: the `isotone` command, claims and reports, data, checkpoints, timing.

Nothing here imports torch or jax until it is used, and nothing here knows a paper.
"""

__version__ = "0.1.0"
