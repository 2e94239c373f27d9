# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""Load a drafter without knowing its family."""

from pathlib import Path
from typing import Any

import torch

from .base import Drafter
from .dflash import DFlashDraftModel
from .dflash2 import DFlash2DraftModel
from .dspark import DSparkDraftModel
from .eagle3 import Eagle3DraftModel
from .merging import merge_chain
from .published.adapter import adapter_chain, naming_base, require_peft
from .published.checkpoint import CheckpointSource, read_drafter_config
from .published.family import FAMILIES


#: The class of each family; its config's is `config_class`.
DRAFTER_CLASSES: dict[str, type[Drafter]] = {
    "dflash": DFlashDraftModel,
    "dspark": DSparkDraftModel,
    "dflash2": DFlash2DraftModel,
    "eagle3": Eagle3DraftModel,
}
# What reads a `config.json` lies below the families, and knows them from here.
FAMILIES |= {name: drafter.config_class.published for name, drafter in DRAFTER_CLASSES.items()}
_OTHER_BASE = "Give its drafter as `base`."


class AutoDrafter:
    """
    Loads a drafter of any family in any published layout.

    | layout | recognised by |
    |---|---|
    | EAGLE-3, flat: this package, SafeAILab, SpecForge, AngelSlim | `architectures`: `LlamaForCausalLMEagle3` |
    | the same under other names | `Eagle3LlamaForCausalLM`, or `LlamaForCausalLM` with `draft_vocab_size` |
    | DFlash, flat: this package, z-lab, SpecForge, ModelOpt | `architectures`: `DFlashDraftModel` |
    | DFlash of transformers | `architectures`: `MuseGlimmerAssistantModel` |
    | DSpark, flat: this package, DeepSpec (its DFlash too), ModelOpt | `architectures`: `Qwen3DSparkModel` |
    | the same of SpecForge | `architectures`: `DSparkDraftModel` |
    | DFlash 2, flat: this package, z-lab, SpecForge | `architectures`: `DFlash2DraftModel` |
    | speculators | `speculators_model_type`: `eagle3`, `dflash`, `dspark`, `dflash2` |
    | LoRA adapter of any of them, as PEFT saves it | `adapter_config.json`; merged into the drafter it names |

    `model_type` is not read: published drafters have llama or qwen3 there. Variants that compute something else
    (Domino, P-EAGLE, other layers, quantised weights, more than one EAGLE-3 layer, ...) are refused with the reason.

    Example:

    ```python
    >>> from trl_draft_opd import AutoDrafter

    >>> drafter = AutoDrafter.from_pretrained("z-lab/Qwen3-4B-DFlash-b16")
    ```
    """

    def __init__(self) -> None:
        raise TypeError(
            "`AutoDrafter` is not instantiated. Load a drafter with `AutoDrafter.from_pretrained(...)`, or make a "
            "fresh one with the `from_target(...)` of its class."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        num_target_layers: int | None = None,
        allow_pickle_weights: bool = False,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        base: str | Path | None = None,
    ) -> Drafter:
        """
        Load a drafter; the arguments but `base` are those of [`Drafter.from_pretrained`].

        Args:
            pretrained_model_name_or_path (`str` or `Path`):
                Folder or Hub id.
            base (`str` or `Path`, *optional*):
                Of an adapter: the drafter it was trained on, in place of the one its config names.

        Returns:
            [`Drafter`] of the class of its family.

        Raises:
            ValueError: If the checkpoint is of no supported kind, or its weights do not fit.
            OSError: If the folder or repository does not exist, or lacks config or weights.
            ImportError: If it is an adapter and PEFT is not installed.
        """
        source = CheckpointSource(
            str(pretrained_model_name_or_path), revision, subfolder, token, cache_dir, local_files_only
        )
        options = {"num_target_layers": num_target_layers, "allow_pickle_weights": allow_pickle_weights}
        *adapters, whole = adapter_chain(source, base=None if base is None else str(base), fix=_OTHER_BASE)
        if not adapters:
            if base is not None:
                raise ValueError(
                    f"{str(source)!r} is a whole drafter, so `base` means nothing to it. Leave `base` out."
                )
            return _load_whole(source, dtype=dtype, **options)
        require_peft(f"Merging the adapter {str(source)!r}")
        with naming_base(adapters[-1], whole, _OTHER_BASE):
            drafter = _load_whole(whole, dtype=torch.float32, **options)
        return merge_chain(drafter, adapters, dtype=dtype)


def _load_whole(source: CheckpointSource, *, num_target_layers: int | None, **options: Any) -> Drafter:
    """Load a drafter that is no adapter, with the class of its family."""
    family = read_drafter_config(source, num_target_layers=num_target_layers).family
    return DRAFTER_CLASSES[family].from_pretrained(
        source.name_or_path, num_target_layers=num_target_layers, **source.places(), **options
    )
