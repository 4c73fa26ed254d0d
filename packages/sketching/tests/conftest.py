import importlib.metadata
import os
from pathlib import Path

# before jax is imported: programs that compile fast rather than run fast, and are kept between runs; four CPU devices
FLAGS = ["--xla_backend_optimization_level=0", "--xla_force_host_platform_device_count=4"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # later ones do not know it, and stop
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.cwd() / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
