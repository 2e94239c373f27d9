# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The frozen target: load it, tap its layers, read text, decode with its cache. Knows no drafter.

Shape letters:  B = sequences, L = text length, C = cached slots, n = new tokens, H = the target's hidden size,
                F = feature width (tapped layers times H), V = vocabulary
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..data.templates import read_template
from ..data.text_reader import TextReader
from ..drafters.packing import RowPacking
from ..drafters.target_model import (
    is_adapted_target,
    load_target_model,
    load_target_tokenizer,
    target_chain,
    whole_model,
)
from ..drafters.target_shape import scales_logits, text_config
from ..utils.versions import cache_name_of
from .around import count_logit_buffers, embed_tokens, project_states
from .attention import Spans, attending_within_texts
from .bodiless import WholeWeights, load_without_body
from .cache import text_cache
from .checks import (
    chunking_reason,
    describe_text_settings,
    find_layers,
    refuse_not_finite,
    require_weights,
    rollback_reason,
)
from .delivered import read_delivered
from .fingerprint import fingerprint_weights
from .placement import Lockstep, device_of, place_weights, shard_layers
from .probes import check_head, find_norm, find_padding_reason, is_quantized
from .reading import ReadingSource, TargetReading, TextReading
from .texts import LAST, Keep, Passes, read_packed, read_padded, tokens_at_once
from .vocabulary import describe_beyond, eos_ids, find_unused_id, pad_id, special_ids


if TYPE_CHECKING:
    from peft import PeftModel


class FrozenTarget:
    """
    The LLM being accelerated: frozen and in evaluation mode. Not an `nn.Module`, so that no trainer, optimiser or
    checkpoint ever picks up its weights.

    Args:
        causal_lm ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Decoder-only causal language model. Frozen in place; an adapter is merged into a copy.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer.

    Raises:
        ValueError: If the model is multimodal, has no decoder layers to tap, its head is quantised, or cannot be
            reproduced outside of it.

    Example:

    ```python
    >>> from trl_draft_opd import FrozenTarget

    >>> target = FrozenTarget.load("Qwen/Qwen3-4B")
    ```
    """

    def __init__(
        self,
        causal_lm: "PreTrainedModel | PeftModel",
        tokenizer: PreTrainedTokenizerBase | None = None,
        _weights: WholeWeights | None = None,
    ):
        # Whether an adapter was merged into these weights: no server loads them by `config.name_or_path`.
        self.is_merged = is_adapted_target(causal_lm)
        model = whole_model(causal_lm)
        self.causal_lm: PreTrainedModel = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.config = text_config(model.config)
        self.backbone = model.base_model
        # Of a model without its body: all its weights, which lie in its files.
        self._weights = _weights
        self.layers = find_layers(self.backbone, self.config) if self.has_body else nn.ModuleList()
        self._cache_name = cache_name_of(self.backbone.forward)
        # A counter for reports: forward passes that read text or branches.
        self.num_forwards = 0
        self._lockstep: Lockstep | None = None
        # Where `read_text` gets the states from, in place of the body; set by whoever opens a source for this target.
        self.source: ReadingSource | None = None
        require_weights(model)
        if self.has_body and is_quantized(model):
            # Before the first forward pass: bitsandbytes lays weights out anew in it on a CPU, and putting them back,
            # as a state dict does, changes what they compute.
            _ = self.weights_fingerprint
        self._has_own_varlen = False
        alone = check_head(model, self.config, self.project)
        self._padding_reason = None
        if not self.has_body:
            # Found now, so that a family without one is refused now.
            _ = self._final_norm
            # Whoever runs the model itself would take the embedding for what the layers make of it.
            self.backbone.register_forward_pre_hook(lambda *_: self.require_body("Decoding"))
        else:
            self._padding_reason = find_padding_reason(model, self.config, alone, self._read_probe)
        if self._padding_reason is not None:
            warnings.warn(
                f"Target of type {self.config.model_type!r} {self._padding_reason}. So its texts are read in padded "
                "rows with a mask, which costs time where they differ in length."
            )
        self.num_forwards = 0
        if (settings := describe_text_settings(model)) is not None:
            warnings.warn(settings)

    @classmethod
    def load(
        cls,
        target: "str | Path | PreTrainedModel | PeftModel | FrozenTarget",
        *,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        init_kwargs: dict[str, Any] | None = None,
        body: bool = True,
    ) -> "FrozenTarget":
        """
        Load a target by Hub id or path, or wrap an instance.

        Args:
            target (`str`, `Path`, `PreTrainedModel`, `PeftModel` or `FrozenTarget`):
                The target; a PEFT adapter, by name or as an instance, is merged into its base. An existing
                `FrozenTarget` is returned as it is.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Precision of the weights; `"auto"` keeps the checkpoint's. Ignored for an instance.
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                As in `transformers`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Defaults to the tokenizer beside the target when it is given by id or path.
            init_kwargs (`dict`, *optional*):
                Further arguments for `from_pretrained`, e.g. a `quantization_config`.
            body (`bool`, *optional*, defaults to `True`):
                Whether to load the decoder layers. Without them, texts are read by a [`ReadingSource`] set as
                `source`, and nothing is decoded. For a target given by name, with safetensors; a quantised one needs
                no quantiser then.

        Raises:
            OSError: If there is no such folder or repository.
            ValueError:
                If `init_kwargs` or `body=False` come with an instance, or the target cannot be used.
            ImportError: If it is an adapter and PEFT is not installed.
        """
        if not body and not isinstance(target, str | Path):
            raise ValueError(
                "`body=False` was given with an instantiated target, whose body is there. Pass its id or path, or "
                "leave `body` out."
            )
        if isinstance(target, FrozenTarget):
            return target
        if isinstance(target, PreTrainedModel) or is_adapted_target(target):
            if init_kwargs:
                raise ValueError(
                    f"`target_init_kwargs` {sorted(init_kwargs)} were given with an instantiated target. Pass the "
                    "target's id or path, or load it with these arguments yourself."
                )
            return cls(target, tokenizer)
        chain = target_chain(str(target), revision=revision, options=init_kwargs)
        settings: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code, "init_kwargs": init_kwargs}
        model, weights = (load_target_model(chain, **settings), None) if body else load_without_body(chain, **settings)
        if tokenizer is None:
            tokenizer = load_target_tokenizer(chain, trust_remote_code=trust_remote_code)
        loaded = cls(model, tokenizer, weights)
        loaded.is_merged = len(chain) > 1
        return loaded

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def has_body(self) -> bool:
        """Whether the decoder layers are there."""
        return self._weights is None

    def require_body(self, what: str) -> None:
        """Raise `ValueError` that `what` needs the decoder layers, unless they are there."""
        if not self.has_body:
            raise ValueError(
                f"{what} needs the target's body, which was not loaded (`body=False`). Train by replay "
                "(`rollout='replay'`, `rejected_scope='first'`) on responses that a server has written "
                "(`trl-draft-opd generate --engine vllm`), or load the whole target."
            )

    @property
    def device(self) -> torch.device:
        """Device of the target's embedding, where token ids go."""
        return device_of(self.causal_lm.get_input_embeddings())

    @property
    def vocab_size(self) -> int:
        """Rows of the head: valid token ids are `0..vocab_size - 1`."""
        return self.config.vocab_size

    @cached_property
    def weights_fingerprint(self) -> str:
        """SHA-256 of all weights, rounded to bfloat16; taken once, about a second per gigabyte and CPU core."""
        return fingerprint_weights(self.causal_lm) if self._weights is None else self._weights.fingerprint()

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole target; a tied head counts once."""
        return self.causal_lm.num_parameters() if self._weights is None else self._weights.num_parameters

    @property
    def num_positions(self) -> int | None:
        """Tokens that a text can have, prompt and response together; `None` where the config names no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a response: the generation config's, and the tokenizer's where the target has it."""
        return eos_ids(self.config, self.causal_lm.generation_config, self.tokenizer)

    @property
    def pad_token_id(self) -> int:
        """Id used to fill rows; always masked, so any valid id serves."""
        return pad_id(self.config, self.tokenizer, self.eos_token_ids)

    @property
    def special_token_ids(self) -> set[int]:
        """Ids with a meaning of their own: what begins, ends, fills and separates text, or stands for the unknown."""
        ids = {*self.eos_token_ids, self.pad_token_id}
        return ids | special_ids(self.config, self.causal_lm.generation_config, self.tokenizer)

    def find_mask_token_id(self) -> int:
        """
        Find an id that text never uses, for DFlash's masks: the tokenizer's mask token, then `<|mask|>` or
        `<|MASK|>`, then a row of the embedding that the tokenizer has no token for.

        Raises:
            ValueError: If there is none; the error lists reserved tokens that the chat template does not use.
        """
        if self.tokenizer is None:
            raise ValueError("The target has no tokenizer to find a mask token in. Pass `mask_token_id=`.")
        return find_unused_id(self.tokenizer, self.vocab_size, self.special_token_ids)

    def text_reader(self, **settings: Any) -> TextReader:
        """
        Return a reader of dataset rows with this target's tokenizer, EOS ids and vocabulary.

        Args:
            settings: `chat_template`, `chat_template_kwargs`, `max_prompt_length`, `max_length` and `num_proc` of
                [`TextReader`]; the template may be the path of a file.

        Raises:
            ValueError: If there is no tokenizer, or no such template.
        """
        if self.tokenizer is None:
            raise ValueError(
                "No tokenizer: the target was given as an instance. Pass `processing_class`, or give `FrozenTarget` "
                "one."
            )
        beyond = describe_beyond(self.tokenizer, self.vocab_size)
        if beyond is not None:
            warnings.warn(beyond)
        settings |= {"chat_template": read_template(settings.get("chat_template"))}
        return TextReader(self.tokenizer, tuple(self.eos_token_ids), self.vocab_size, **settings)

    @property
    def rollback_reason(self) -> str | None:
        """Why no rejected draft leaves the cache, or `None`: recurrent, linear-attention, sliding or no layers."""
        return rollback_reason(self.causal_lm, self.config) if self.has_body else "was loaded without its body"

    def require_rollback(self) -> None:
        """Refuse targets with a [`rollback_reason`]."""
        self.require_body("A live rollout or a branch")
        if self.rollback_reason is not None:
            raise ValueError(
                f"Target of type {self.config.model_type!r} {self.rollback_reason}. Live rollouts and branches need "
                "full attention in every layer. Such a target trains by replay, supervised or with "
                "`rollout='replay'` and `rejected_scope='first'`, and is evaluated by replay."
            )

    def place(self, device: torch.device) -> None:
        """
        Move the weights to `device`, unless they were spread over devices or quantised on loading.

        Raises:
            ValueError: If they were spread, and the embedding is not on `device`; or quantised, which cannot be moved,
                on another kind of device.
        """
        # What is left without the layers is never quantised.
        place_weights(self.causal_lm, device, is_quantized=self.has_body and is_quantized(self.causal_lm))

    def shard(self, device: torch.device) -> None:
        """
        Shard the decoder layers over all ranks, in place; embedding and head stay whole. Collective.

        From now on `read_text`, `step` and `generate` of the model are collective too, and every rank ends each phase
        of using them with [`finish_together`].
        """
        self.require_body("Sharding")
        # Of the whole weights, while this rank has them.
        _ = self.weights_fingerprint
        self._lockstep = shard_layers(self.causal_lm, self.backbone, self.layers, device)

    def _read_probe(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, spans: Spans, has_own_varlen: bool
    ) -> torch.Tensor:
        """Read a row of several texts with or without the implementation's own handling of them; `(1, T, H)`."""
        self._has_own_varlen, outputs = has_own_varlen, {}
        self._forward(input_ids, None, position_ids, None, (), outputs.__setitem__, spans)
        return outputs[LAST]

    @property
    def reads_packed(self) -> bool:
        """Whether texts are read end to end; else in padded rows, for a reason that was given on loading."""
        return self._padding_reason is None

    @property
    def is_sharded(self) -> bool:
        """Whether [`shard`] was called."""
        return self._lockstep is not None

    def finish_together(self) -> None:
        """End a phase in which ranks may use a sharded target unequally often. Collective."""
        if self._lockstep is not None:
            self._lockstep.finish()

    # -- what it does -------------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids as transformers' DFlash decoding does: with the family's scale, without an input norm."""
        with self._outside_autocast():
            return embed_tokens(self.causal_lm, input_ids)

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn outputs of the last layer `(..., H)` into inputs of the head: the target's final norm."""
        with self._outside_autocast():
            return self._final_norm(hidden)

    @cached_property
    def _final_norm(self) -> nn.Module:
        return find_norm(self.causal_lm, self.config, self.layers)

    @property
    def scales_logits(self) -> bool:
        """Whether `project` scales or caps what the head returns, and so holds two copies beside it."""
        return scales_logits(self.config)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """
        Turn inputs of the head `(..., H)` into logits `(..., V)`, the family's scales and soft cap included. In the
        head's own precision, whatever autocast says.
        """
        with self._outside_autocast():
            return project_states(self.causal_lm, self.config, hidden)

    @property
    def num_logit_buffers(self) -> int:
        """Tensors of the logits' size that [`project`] and its backward pass hold at once, for memory budgets."""
        return count_logit_buffers(self.config)

    @torch.no_grad()
    def read_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        layer_ids: Sequence[int],
        keep_cache: bool = False,
    ) -> TextReading:
        """
        Read right-padded text.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Right-padded token ids.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
            layer_ids (`Sequence[int]`): Layers to tap, ascending.
            keep_cache (`bool`, *optional*, defaults to `False`): Keep keys and values, for `score_branches`.

        Returns:
            `TextReading`: the states of all text, its rows end to end.

        Raises:
            NotFiniteError: If a hidden state of the text is NaN or infinite.
            ValueError, OSError: If a `source` does not have the text, or fails; see [`ReadingSource`].
        """
        packing = RowPacking.of(attention_mask)
        if self.source is not None and not keep_cache:
            reading = read_delivered(self.source, input_ids, packing, layer_ids, self.causal_lm.dtype, self.norm)
            refuse_not_finite(reading.last_hidden, packing.rows)
            return reading
        if not self.has_body:
            raise ValueError(
                "The target was loaded without its body, so it reads no text by itself. Give trainers and commands "
                "`readings`, or set `target.source = open_readings(target, ...)`, a folder or servers; or load the "
                "whole target."
            )
        new_cache = partial(text_cache, self.config)
        passes = Passes(layer_ids, tokens_at_once(self.device), keep_cache, new_cache)
        if self.reads_packed:
            reading = read_packed(self._forward, passes, input_ids, packing, self.causal_lm.dtype)
        else:
            can_chunk = chunking_reason(self.causal_lm, self.config) is None
            reading = read_padded(self._forward, passes, input_ids, attention_mask, packing, can_chunk)
        refuse_not_finite(reading.last_hidden, packing.rows)
        return reading

    @torch.no_grad()
    def step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: DynamicCache | None,
        layer_ids: Sequence[int],
        spans: Spans | None = None,
    ) -> TargetReading:
        """
        Read `n` new tokens per row in one forward pass, on top of the cache, which grows by `n` slots.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, n)`): New tokens.
            attention_mask (`torch.LongTensor` of shape `(B, C + n)`):
                0 hides a slot: left padding or a rejected draft. Or additive and per query, `(B, 1, n, C + n)`.
            position_ids (`torch.LongTensor` of shape `(B, n)`): True positions, whatever slots hold the tokens.
            cache ([`~transformers.DynamicCache`] or `None`): Cache of `C` slots, changed in place.
            layer_ids (`Sequence[int]`): Layers to tap, ascending.
            spans ([`Spans`], *optional*):
                Instead of a mask, where [`reads_packed`] is true: the tokens are of several texts, end to end.
        """
        outputs: dict[int, torch.Tensor] = {}
        self._forward(input_ids, attention_mask, position_ids, cache, layer_ids, outputs.__setitem__, spans)
        last_hidden = outputs.pop(LAST)
        features = [outputs[place] for place in range(len(layer_ids))]
        return TargetReading(torch.cat(features, dim=-1) if features else last_hidden[..., :0], last_hidden)

    def _forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        cache: DynamicCache | None,
        layer_ids: Sequence[int],
        keep: Keep,
        spans: Spans | None = None,
    ) -> None:
        """Run the backbone once, as [`step`] does, and hand its outputs to `keep`, on the target's device."""
        self.num_forwards += 1
        options: dict[str, Any] = {self._cache_name: cache}
        switch: Any = nullcontext()
        if spans is not None and not (self._has_own_varlen and spans.has_no_mask):
            switch, options["text_spans"] = attending_within_texts(self.config), spans
        with self._outside_autocast(), self._tapped(layer_ids, keep), switch:
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **options,
            )
        keep(LAST, output.last_hidden_state.to(self.device))

    def _outside_autocast(self) -> Any:
        """Return the context in which the target computes: in the precision that it was loaded in."""
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    @contextmanager
    def _tapped(self, layer_ids: Sequence[int], keep: Keep) -> Iterator[None]:
        """Hand the outputs of the chosen layers, and of no other, to `keep` during one forward."""

        def tap(place: int, module: nn.Module, args: Any, output: Any) -> None:
            # A target spread over devices leaves each layer's output on the layer's own.
            keep(place, (output[0] if isinstance(output, tuple) else output).to(self.device))

        handles = [self.layers[i].register_forward_hook(partial(tap, place)) for place, i in enumerate(layer_ids)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
