"""Models out of folders: swift ones and others, and what is said of a folder that holds none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from isotone.shared.errors import InputError
from isotone.swiftkv.config import SwiftKVConfig
from isotone.swiftkv.families import KEY_VALUE_MODULES, QUERY_MODULES
from isotone.swiftkv.modeling import MODELS

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class SwiftKVForCausalLM:
    """`from_pretrained` for a swift model of any family, as `AutoModelForCausalLM` is for all models."""

    @staticmethod
    def from_pretrained(folder: str | Path, **kwargs: Any) -> Any:
        """The swift model in `folder` (or of that name on the hub), ours or the authors' checkpoint, in eval mode, its
        student switched on.

        Raises `InputError` where there is no model, or not a swift one.
        """
        kept = config_of(folder, **kwargs)
        kind = str(kept.model_type).removesuffix("_swiftkv")
        if kept.model_type not in {f"{name}_swiftkv" for name in MODELS}:
            raise InputError(
                f"expected a swift model in {str(folder)!r}, got one of type {kept.model_type!r}; convert it"
            )
        kept.swiftkv = True
        loaded: Any = MODELS[kind]
        with reading(folder):
            model, report = loaded.from_pretrained(folder, config=kept, output_loading_info=True, **kwargs)
        # the authors' checkpoints hold the teacher's projections too and do not say so
        _check_whole(report, folder, replaced(model))
        check_finite(model)
        return model.eval()


def check_finite(model: Any) -> None:
    """Raise `InputError` where a weight is NaN or infinite; attention may hide one that is (SDPA gives 0 for a query of
    NaN), so that the outputs do not say it."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")


_WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def replaced(model: Any) -> tuple[str, ...]:
    """How the names of the upper layers' projections begin that swift ones stand for."""
    upper = SwiftKVConfig.of(model.config).upper
    return tuple(
        f"model.layers.{number}.self_attn.{name}." for number in upper for name in QUERY_MODULES + KEY_VALUE_MODULES
    )


def _check_whole(report: Any, folder: str | Path, spare: tuple[str, ...] = ()) -> None:
    """Raise `InputError` where weights are missing, which transformers would draw at random, or some are of no use, as
    where l, g or the number of layers was edited in the config."""
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"expected every weight of the model in {str(folder)!r}, {missing[0]} is missing")
    found = [key for key in report["unexpected_keys"] if not key.startswith(spare)]
    if strange := sorted(key for key in found if ".layers." in key or "_swiftkv" in key):
        raise InputError(f"expected the weights that the config of {str(folder)!r} asks for, got {strange[0]} too")


def config_of(folder: str | Path, **kwargs: Any) -> Any:
    """The config of the model in `folder`, or of that name (owner/name) on the hub where there is no such folder.

    `kwargs`: of `from_pretrained`, of which those that say where it lies are used (revision, subfolder, ...). Raises
    `InputError` where there is none.
    """
    where = {key: value for key, value in kwargs.items() if key in _WHERE and value is not None}
    inside = Path(folder) / where.get("subfolder", "") / "config.json"
    if not inside.is_file() and (Path(folder).exists() or not _HUB.fullmatch(str(folder))):
        raise InputError(f"expected a Hugging Face model folder with a config.json at {str(folder)!r}, found none")
    with reading(folder):
        return AutoConfig.from_pretrained(folder, **where)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Errors that a broken model folder causes, as one sentence that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # a config whose values are of other types has errors of its own, out of huggingface_hub
        known = isinstance(error, (OSError, ValueError, KeyError, RuntimeError, SafetensorError))
        if not known and not type(error).__module__.startswith("huggingface_hub"):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"expected a whole Hugging Face model in {str(folder)!r}: {first}") from None


def load(folder: str | Path, **kwargs: Any) -> Any:
    """Any causal language model in `folder`, swift or not, in eval mode; or of that name (owner/name) on the hub.

    Raises `InputError` where there is none.
    """
    kept = config_of(folder, **kwargs)
    if str(kept.model_type).endswith("_swiftkv"):
        return SwiftKVForCausalLM.from_pretrained(folder, **kwargs)
    with reading(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, config=kept, output_loading_info=True, **kwargs)
    model, report = loaded
    _check_whole(report, folder)
    return model.eval()
