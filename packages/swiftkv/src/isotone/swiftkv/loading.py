"""Models out of folders: swift ones and others, and what is said of a folder that holds none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from isotone.shared.errors import InputError
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
        kept = config_of(folder)
        kind = str(kept.model_type).removesuffix("_swiftkv")
        if kept.model_type not in {f"{name}_swiftkv" for name in MODELS}:
            raise InputError(
                f"expected a swift model in {str(folder)!r}, got one of type {kept.model_type!r}; convert it"
            )
        kept.swiftkv = True
        loaded: Any = MODELS[kind]
        with reading(folder):
            model, report = loaded.from_pretrained(folder, config=kept, output_loading_info=True, **kwargs)
        if missing := sorted(report["missing_keys"]):
            # transformers would give them random values and go on
            raise InputError(f"expected every weight of the model in {str(folder)!r}, {missing[0]} is missing")
        check_finite(model)
        return model.eval()


def check_finite(model: Any) -> None:
    """Raise `InputError` where a weight is NaN or infinite; attention may hide one that is (SDPA gives 0 for a query of
    NaN), so that the outputs do not say it."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"expected finite weights, got NaN or infinity in {name}")


def config_of(folder: str | Path) -> Any:
    """The config of the model in `folder`, or of that name (owner/name) on the hub where there is no such folder.

    Raises `InputError` where there is none.
    """
    if not (Path(folder) / "config.json").is_file() and (Path(folder).exists() or not _HUB.fullmatch(str(folder))):
        raise InputError(f"expected a Hugging Face model folder with a config.json at {str(folder)!r}, found none")
    with reading(folder):
        return AutoConfig.from_pretrained(folder)


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Errors that a broken model folder causes, as one sentence that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"expected a whole Hugging Face model in {str(folder)!r}: {first}") from None


def load(folder: str | Path, **kwargs: Any) -> Any:
    """Any causal language model in `folder`, swift or not, in eval mode; or of that name (owner/name) on the hub.

    Raises `InputError` where there is none.
    """
    kept = config_of(folder)
    if str(kept.model_type).endswith("_swiftkv"):
        return SwiftKVForCausalLM.from_pretrained(folder, **kwargs)
    with reading(folder):
        return AutoModelForCausalLM.from_pretrained(folder, config=kept, **kwargs).eval()
