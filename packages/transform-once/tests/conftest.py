"""Four CPU devices, and programs compiled in haste, before JAX starts: the tests compile much and run little."""

import os

FLAGS = " --xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
