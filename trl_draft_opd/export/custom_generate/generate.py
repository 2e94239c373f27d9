# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Decode with a published drafter: `target.generate(**inputs, custom_generate="ORG/DRAFTER", trust_remote_code=True)`.

Takes every argument of `generate`, and `drafter` (folder or Hub id of another drafter than the one beside this file)
and `num_drafts`. One sequence at a time. Every token is chosen by the target exactly as plain decoding chooses it, in
the same order and with the same random numbers, so the text is that of plain decoding; drafts only decide how many
tokens one pass of the target yields. What remains is rounding: a pass over several tokens adds up in another order
than one over a single token, which float32 hardly ever shows and bfloat16 may, where two tokens are all but equally
likely.
"""

import copy
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .drafters import DRAFTERS, Drafter


# Where the drafter lies if the call does not tell; filled in when it is published.
DRAFTER = None

# What `generate` prepares for a target that reads text alone.
_PREPARED = {"attention_mask", "cache_position", "logits_to_keep", "position_ids", "use_cache"}
# What transformers calls keys and values: until 5.23, and since. Whichever name `generate` uses, the target takes.
_CACHE_NAMES = ("past_key_values", "cache")
# (source, device, dtype) to (which files, drafter).
_LOADED: dict[tuple, tuple] = {}


def _file(source: str, name: str) -> Path:
    folder, way_out = Path(source), 'Pass `drafter="ORG/NAME"`, or the folder of an export.'
    if folder.is_dir():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{source!r} holds no {name!r}, so it is no published drafter. {way_out}")
        return folder / name
    try:
        return Path(hf_hub_download(source, name))
    except HFValidationError as error:
        raise ValueError(
            f"The drafter {source!r} is neither a folder on this machine nor a Hub id. {way_out}"
        ) from error
    except OSError as error:
        raise OSError(f"Could not get {name!r} of the drafter {source!r} from the Hub: {error} {way_out}") from error


def _read(source: str) -> tuple[dict[str, Any], dict[str, torch.Tensor], type[Drafter]]:
    """Read config and tensors, and find their class; refuse what is not the flat layout of a drafter known here."""
    config = json.loads(_file(source, "config.json").read_text("utf-8"))
    kind = DRAFTERS.get((config.get("architectures") or [""])[0])
    if kind is None:
        raise ValueError(
            f"{source!r} is no drafter in the flat layout that can be read here: architectures "
            f"{config.get('architectures')}, but known are {sorted(DRAFTERS)}. Name a repository or folder that "
            "`trl-draft-opd export` made."
        )
    tensors = load_file(_file(source, "model.safetensors"))
    # The embedding is the target's; some files hold a copy for engines that want one. `t2d` is read in training.
    for name in ("embed_tokens.weight", "t2d"):
        tensors.pop(name, None)
    wanted = kind.names_in(config)
    if wanted != set(tensors):
        raise ValueError(
            f"The weights of {source!r} do not fit its config: missing {sorted(wanted - set(tensors))}, unexpected "
            f"{sorted(set(tensors) - wanted)}. Download or export it again."
        )
    return config, tensors, kind


def _own_place() -> str | None:
    """
    Return the folder or repository that `generate` was loaded from, which holds its drafter: transformers hands a
    function everything but that, so it is looked up in the call. `None` where it was not called by that name.
    """
    call = inspect.currentframe()
    for _ in range(2):
        call = call and call.f_back
    place = call.f_locals.get("custom_generate") if call else None
    return place if isinstance(place, str) else None


def load_drafter(source: str | None, model: Any) -> Drafter:
    """Load the drafter in the target's precision, once per place, device and precision, and again once replaced."""
    source = source or DRAFTER
    if source is None:
        raise ValueError(
            'This file does not know where its drafter lies. Pass `drafter="ORG/NAME"`, or its local folder.'
        )
    source, weights = str(source), Path(source) / "model.safetensors"
    stamp = (weights.stat().st_ino, weights.stat().st_mtime_ns) if weights.is_file() else None
    key = (source, model.get_input_embeddings().weight.device, model.dtype)
    if key not in _LOADED or _LOADED[key][0] != stamp:
        config, tensors, kind = _read(source)
        _check(config, kind.layer_ids_in(config), model.config.get_text_config())
        _LOADED[key] = (stamp, kind(config, tensors, *key[1:]))
    drafter = _LOADED[key][1]
    _check(drafter.config, drafter.layer_ids, model.config.get_text_config())
    return drafter


def _check(drafter: dict[str, Any], ids: list[int], target: Any) -> None:
    """Refuse a drafter of another target."""
    pairs = {
        "vocab_size": (drafter["vocab_size"], target.vocab_size),
        "hidden_size": (drafter.get("target_hidden_size") or drafter["hidden_size"], target.hidden_size),
        "num_target_layers": (drafter.get("num_target_layers") or target.num_hidden_layers, target.num_hidden_layers),
    }
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if max(ids) >= target.num_hidden_layers:
        wrong["layers read"] = (ids, target.num_hidden_layers)
    if wrong:
        raise ValueError(f"The drafter was made for another target: (drafter, target) {wrong}.")


class Taps:
    """Keeps what some layers of the target gave out in its last forward pass in this thread."""

    def __init__(self, model: Any, layer_ids: list[int]):
        layers = model.get_decoder().layers
        self.thread = threading.get_ident()
        self.outputs: list[Any] = [None] * len(layer_ids)
        self.handles = [layers[layer].register_forward_hook(self._keep(i)) for i, layer in enumerate(layer_ids)]

    def _keep(self, index: int) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if threading.get_ident() == self.thread:
                self.outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def features(self, device: torch.device) -> torch.Tensor:
        """Return `(1, n, F)` of the last pass, on one device, whichever the layers are on."""
        return torch.cat([output.to(device) for output in self.outputs], dim=-1)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def generate(model: Any, drafter: str | None = None, num_drafts: int | None = None, **kwargs: Any) -> Any:
    """
    Decode with the target, verifying drafts; the result is `model.generate`'s own.

    Args:
        model (`PreTrainedModel`): The target; transformers passes it.
        drafter (`str`, *optional*): Folder or Hub id of the drafter; `draft_model` is understood, too.
        num_drafts (`int`, *optional*): Drafts per block; those of its training by default.
        kwargs: Arguments of `generate`.

    Returns:
        `torch.LongTensor` of shape `(1, length)`: prompt and response; or, with `return_dict_in_generate`, an output
        with `sequences`, the cache and, where asked for, `scores` and `logits`.

    Raises:
        ValueError: If the drafter is unknown or of another target, or an argument asks for what blocks cannot do: more
            than one sequence, beams, inputs that are not text, a cache that cannot be cropped, hidden states or
            attentions.
        OSError: If the drafter cannot be found.
    """
    if kwargs.get("assistant_model") is not None:
        raise ValueError(
            "`assistant_model` has no part here. Leave it out, or call `generate` without `custom_generate`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder; drafters are for decoders alone. Call plain `generate`."
        )
    if drafter is None:
        drafter = kwargs.pop("draft_model", None)
    loaded = load_drafter(drafter or _own_place(), model)
    count = loaded.default_drafts if num_drafts is None else num_drafts
    if count < 1 or (loaded.max_drafts is not None and count > loaded.max_drafts):
        most = "" if loaded.max_drafts is None else f" and at most {loaded.max_drafts}, the drafter's block"
        raise ValueError(f"`num_drafts` must be at least 1{most}, got {count}.")
    kwargs = _with_stop_strings(kwargs)
    # transformers hands a function no streamer.
    streamer = kwargs.get("streamer")

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Callable,
        stopping_criteria: Callable,
        generation_config: Any,
        **rest: Any,
    ) -> Any:
        _check_decoding(model, input_ids, generation_config, rest)
        taps = Taps(model, loaded.layer_ids)
        try:
            name, cache = _find_cache(rest)
            decoding = _Decoding(model, loaded.for_new_text(), taps, count, generation_config, name, cache)
            return decoding.run(input_ids, rest.get("attention_mask"), logits_processor, stopping_criteria, streamer)
        finally:
            taps.remove()

    return model.generate(custom_generate=decode, **kwargs)


def _with_stop_strings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Turn `stop_strings` into a criterion, because transformers hands a function no tokenizer."""
    config = kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or getattr(config, "stop_strings", None)
    if not strings:
        return kwargs
    if kwargs.get("tokenizer") is None:
        raise ValueError(f"`stop_strings` {strings!r} need the tokenizer. Pass `tokenizer=`.")
    kwargs = {name: value for name, value in kwargs.items() if name != "stop_strings"}
    if config is not None:
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    criterion = StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
    return kwargs


def _find_cache(prepared: dict[str, Any]) -> tuple[str, Any]:
    """Return keys and values among what `generate` prepared, `None` where it keeps none, and what they are called."""
    return next(((name, prepared[name]) for name in _CACHE_NAMES if name in prepared), (_CACHE_NAMES[0], None))


def _check_decoding(model: Any, input_ids: torch.Tensor, generation_config: Any, rest: dict[str, Any]) -> None:
    if input_ids.shape[0] != 1 or generation_config.num_beams != 1:
        raise ValueError(
            f"One sequence at a time, got {input_ids.shape[0]} with num_beams={generation_config.num_beams}. Call "
            "`generate` once per prompt."
        )
    known = {*_PREPARED, *_CACHE_NAMES}
    unread = sorted(
        name for name, value in rest.items() if name not in known and value is not None and value is not False
    )
    if unread:
        raise ValueError(
            f"Blocks are decoded from `input_ids` and `attention_mask` alone, not with {unread}. Leave them out."
        )
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or []) - {"full_attention"}
    name, cache = _find_cache(rest)
    is_fresh = isinstance(cache, DynamicCache) and cache.get_seq_length() == 0 and not any(cache.is_sliding)
    if kinds or model._is_stateful or not is_fresh:
        raise ValueError(
            "Rejected drafts must be cut off the cache, which needs full attention in every layer and a fresh "
            f"DynamicCache; got layers {sorted(kinds)} and {type(cache).__name__}. Leave `cache_implementation`, "
            f"`{name}` and `use_cache` at their defaults."
        )
    positions, mask = rest.get("position_ids"), rest.get("attention_mask")
    if positions is not None:
        shown = torch.ones_like(input_ids[0], dtype=torch.bool) if mask is None else mask[0] != 0
        if not torch.equal(positions.flatten()[shown], torch.arange(int(shown.sum()), device=positions.device)):
            raise ValueError("`position_ids` must count the tokens of the prompt from 0. Leave them out.")


class _Decoding:
    """One call of `generate`: the target and the drafter go in turns until the stopping criteria say so."""

    def __init__(
        self,
        model: Any,
        drafter: Drafter,
        taps: Taps,
        count: int,
        generation_config: Any,
        cache_name: str,
        cache: DynamicCache,
    ):
        self.model, self.drafter, self.taps, self.count = model, drafter, taps, count
        self.config, self.embed = generation_config, model.get_input_embeddings()
        self.cache_name, self.cache = cache_name, cache
        self.keeps_scores = generation_config.return_dict_in_generate and generation_config.output_scores
        self.keeps_logits = generation_config.return_dict_in_generate and generation_config.output_logits
        self.scores: Any = ()
        self.logits: Any = ()

    def run(self, ids: Any, mask: Any, logits_processor: Callable, stopping_criteria: Callable, streamer: Any) -> Any:
        """Return `ids` (`(1, n)`) and its continuation, in the form that the generation config asks for."""
        # A padded prompt is read without its padding, which the processors and the result still see.
        padding = 0 if mask is None else int((mask[0] == 0).sum())
        if padding and bool((mask[0, :padding] != 0).any()):  # pyright: ignore[reportOptionalSubscript]
            raise ValueError(
                "`attention_mask` hides tokens inside of the prompt; only padding to the left of it can be hidden."
            )
        pending, is_done = ids[:, padding:], False
        num_candidates = 1
        while not is_done:
            logits, features = self._run_target(pending, num_candidates)
            before = ids.shape[1]
            for index in range(num_candidates):
                # Each token on its own, behind those before it: processors, criteria and random numbers see plain
                # decoding.
                row = logits[:, index].to(torch.float32, copy=True)
                processed = logits_processor(ids, row)
                self._keep(processed, row)
                token = _choose(processed, self.config.do_sample)
                ids = torch.cat([ids, token], dim=-1)
                if streamer is not None:
                    streamer.put(token[0].cpu())
                is_done = bool(stopping_criteria(ids, self.scores if self.keeps_scores else None).all())
                if is_done or index + 1 == num_candidates or int(token) != int(pending[0, index + 1]):
                    break
            # The last token was chosen, not read; all others before it are in the cache.
            self._cut(ids.shape[1] - 1 - padding)
            if not is_done:
                num_read = features.shape[1] if num_candidates == 1 else ids.shape[1] - before
                pending = self._draft(ids, features[:, :num_read])
                num_candidates = pending.shape[1]
        if streamer is not None:
            streamer.end()
        return self._result(ids)

    def _run_target(self, pending: torch.Tensor, num_candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the target on `pending`, `(1, n)`; return its last `num_candidates` logits and features, `(1, n, F)`."""
        start = self.cache.get_seq_length()
        positions = torch.arange(start, start + pending.shape[1], device=pending.device)[None]
        keep = {"logits_to_keep": num_candidates} if self.model._supports_logits_to_keep() else {}
        cached: dict[str, Any] = {self.cache_name: self.cache}
        output = self.model(input_ids=pending, position_ids=positions, use_cache=True, **cached, **keep)
        # At once: a processor may run the target itself, as guidance does.
        features = self.taps.features(self.embed.weight.device)
        return output.logits[:, -num_candidates:].to(pending.device), features

    def _cut(self, length: int) -> None:
        """Cut rejected drafts off the cache."""
        rejected = self.cache.get_seq_length() - length
        if rejected > 0:
            # A negative number is how many to cut off, in every version.
            self.cache.crop(-rejected)

    def _draft(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Read the committed tokens' features; return the anchor and the drafts behind it, `(1, 1 + drafts)`."""
        self.drafter.read(features, self.embed(ids[:, -features.shape[1] :]))
        # The target adds a token of its own to every block.
        room = self.count if self.config.max_length is None else self.config.max_length - ids.shape[1] - 1
        anchor = ids[:, -1:]
        return torch.cat([anchor, self._propose(anchor, max(0, min(self.count, room)))], dim=-1)

    def _propose(self, anchor: torch.Tensor, count: int) -> torch.Tensor:
        return self.drafter.draft(anchor, count, self.embed, self._project) if count else anchor[:, :0]

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the target's logits of `hidden` as it computes them: some families scale or cap them."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        logits = head(hidden.to(head.weight.device, head.weight.dtype)).to(hidden.device)
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _keep(self, processed: torch.Tensor, row: torch.Tensor) -> None:
        if self.keeps_scores:
            self.scores = (*self.scores, processed)
        if self.keeps_logits:
            self.logits = (*self.logits, row)

    def _result(self, ids: Any) -> Any:
        if not self.config.return_dict_in_generate:
            return ids
        cached: dict[str, Any] = {self.cache_name: self.cache}
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=self.scores if self.keeps_scores else None,
            logits=self.logits if self.keeps_logits else None,
            **cached,
        )


def _choose(scores: torch.Tensor, is_drawn: bool) -> torch.Tensor:
    """Choose a token, `(1, 1)`, from processed scores `(1, V)` as plain decoding does."""
    if is_drawn:
        return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
    return scores.argmax(dim=-1, keepdim=True)
