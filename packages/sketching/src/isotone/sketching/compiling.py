"""How the programs of the studies are compiled."""

from __future__ import annotations

import functools
import os

import jax

_LEVEL = "xla_backend_optimization_level"
# a level that the user has chosen stands
_OPTIONS = {} if _LEVEL in os.environ.get("XLA_FLAGS", "") else {_LEVEL: 1}

fast_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
"""`jax.jit` at a lower level of the compiler: scans of many small steps compile a quarter sooner and run as fast."""
