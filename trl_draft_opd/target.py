# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The frozen target: load it, tap its layers, read text, decode with its cache, score branches. Knows no drafter.

Shape letters:  B = sequences, L = text length, C = cached slots, n = new tokens, A = anchors per sequence, K = drafts per
                block, H = the target's hidden size, F = feature width (tapped layers times H), V = vocabulary
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ._trl import create_model_from_path
from .drafters.target_shape import text_config


@dataclass(frozen=True)
class TargetReading:
    """
    What one forward pass of the target leaves behind.

    Attributes:
        features (`torch.Tensor` of shape `(B, n, F)`): Outputs of the tapped layers, concatenated in ascending order.
        last_hidden (`torch.Tensor` of shape `(B, n, H)`): Input of the target's head.
    """

    features: torch.Tensor
    last_hidden: torch.Tensor


class FrozenTarget:
    """
    The LLM being accelerated: frozen, in evaluation mode, and read through three calls that keep only what is asked for.

    Not an `nn.Module`, so that no trainer, optimiser or checkpoint ever picks up its weights.

    Args:
        causal_lm ([`~transformers.PreTrainedModel`]):
            Decoder-only causal language model. Frozen in place.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer.

    Raises:
        ValueError: If the model is multimodal, has no decoder layers to tap, or its head cannot be reproduced outside of it.

    Example:

    ```python
    >>> from trl_draft_opd import FrozenTarget

    >>> target = FrozenTarget.load("Qwen/Qwen3-4B")
    ```
    """

    def __init__(self, causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        self.causal_lm = causal_lm.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.config = text_config(causal_lm.config)
        self.backbone = causal_lm.base_model
        self.layers = self._find_layers()
        self._check_head()

    @classmethod
    def load(
        cls,
        target: "str | Path | PreTrainedModel | FrozenTarget",
        *,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> "FrozenTarget":
        """
        Load a target by Hub id or path, or wrap an instance.

        Args:
            target (`str`, `Path`, `PreTrainedModel` or `FrozenTarget`):
                The target; an existing `FrozenTarget` is returned as it is.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Precision of the weights; `"auto"` keeps the checkpoint's. Ignored for an instance.
            revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
                As in `transformers`.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
                Defaults to the tokenizer beside the target when it is given by id or path.
            init_kwargs (`dict`, *optional*):
                Further arguments for `from_pretrained`, e.g. a `quantization_config`.

        Raises:
            ValueError: If `init_kwargs` come with an instance, or the target cannot be used.
        """
        if isinstance(target, FrozenTarget):
            return target
        if isinstance(target, PreTrainedModel):
            if init_kwargs:
                raise ValueError(
                    f"`target_model_init_kwargs` {sorted(init_kwargs)} were given with an instantiated target. Pass the target's id "
                    "or path, or load it with these arguments yourself."
                )
            return cls(target, tokenizer)
        options = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code, "device_map": None}
        model = create_model_from_path(str(target), **options | (init_kwargs or {}))
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                str(target), revision=revision, trust_remote_code=trust_remote_code
            )
        return cls(model, tokenizer)

    # -- what it is ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the target's embedding, where token ids go."""
        return self.causal_lm.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """Rows of the head: valid token ids are `0..vocab_size - 1`."""
        return self.config.vocab_size

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends a response: the generation config's, and the tokenizer's."""
        configured = self.causal_lm.generation_config.eos_token_id if self.causal_lm.generation_config else None
        configured = configured if configured is not None else self.config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        if self.tokenizer is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None})

    @property
    def pad_token_id(self) -> int:
        """Id used to fill rows; always masked, so any valid id serves."""
        for candidate in (self.tokenizer.pad_token_id if self.tokenizer else None, self.config.pad_token_id):
            if candidate is not None:
                return candidate
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    def find_mask_token_id(self) -> int:
        """
        Find an id that text never uses, for DFlash's masks.

        Looks for the tokenizer's mask token, then for `<|mask|>` or `<|MASK|>`, then for a row of the embedding beyond the
        tokenizer.

        Raises:
            ValueError: If there is none.
        """
        if self.tokenizer is None:
            raise ValueError(
                "The target has no tokenizer to look for a mask token in. Pass `mask_token_id=` yourself."
            )
        if self.tokenizer.mask_token_id is not None:
            return self.tokenizer.mask_token_id
        vocabulary = self.tokenizer.get_vocab()
        for name in ("<|mask|>", "<|MASK|>"):
            if name in vocabulary:
                return vocabulary[name]
        if len(self.tokenizer) < self.vocab_size:
            return len(self.tokenizer)
        raise ValueError(
            f"The target's {self.vocab_size} embedding rows are all in use by its tokenizer. Pass `mask_token_id=` of a "
            "reserved token that your text never contains."
        )

    def require_rollback(self) -> None:
        """
        Refuse targets whose cache cannot forget rejected drafts.

        Raises:
            ValueError: For recurrent, linear-attention and sliding-window targets, saying which and what serves them.
        """
        reason = None
        layer_types = set(getattr(self.config, "layer_types", None) or [])
        if self.causal_lm._is_stateful:
            reason = "keeps a recurrent state, which cannot be rolled back to before a rejected draft"
        elif layer_types - {"full_attention"}:
            reason = f"has layers of type {sorted(layer_types - {'full_attention'})}, whose cache drops or mixes what a rejected draft must not touch"
        elif not layer_types and getattr(self.config, "sliding_window", None) is not None:
            reason = f"uses a sliding window of {self.config.sliding_window} tokens, counted in cache slots that include rejected drafts"
        if reason is not None:
            raise ValueError(
                f"Target of type {self.config.model_type!r} {reason}. Live rollouts and evaluation need full attention in every layer. "
                "Such a target trains without them: supervised with `eval_rollouts=False`, or with `rollout='replay'`, "
                "`rejected_scope='first'` and no `eval_dataset`."
            )

    def place(self, device: torch.device) -> None:
        """Move the weights to `device`, unless they were spread over devices or quantised on loading."""
        is_spread = getattr(self.causal_lm, "hf_device_map", None) is not None
        is_quantized = getattr(self.causal_lm.config, "quantization_config", None) is not None
        if not is_spread and not is_quantized:
            self.causal_lm.to(device)

    # -- what it does --------------------------------------------------------------------------------------------------

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """
        Embed token ids as transformers' own DFlash decoding does: the family's scale included, an input norm left out.
        """
        embedding = self.causal_lm.get_input_embeddings()
        norm = getattr(embedding, "embed_norm", None)
        if norm is None:
            return embedding(input_ids)
        embedding.embed_norm = nn.Identity()
        try:
            return embedding(input_ids)
        finally:
            embedding.embed_norm = norm

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn inputs of the head `(..., H)` into logits `(..., V)`, the family's scales and soft cap included."""
        head = self.causal_lm.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype))
        config = self.config
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @torch.no_grad()
    def read_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, layer_ids: Sequence[int]
    ) -> TargetReading:
        """
        Read right-padded text.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Right-padded token ids.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
            layer_ids (`Sequence[int]`): Layers to tap, ascending.

        Returns:
            `TargetReading` over all `L` positions.
        """
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self._forward(input_ids, attention_mask, position_ids, None, layer_ids)

    @torch.no_grad()
    def step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: DynamicCache,
        layer_ids: Sequence[int],
    ) -> TargetReading:
        """
        Read `n` new tokens per row on top of the cache, which grows by `n` slots.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, n)`): New tokens.
            attention_mask (`torch.LongTensor` of shape `(B, C + n)`): 0 hides a slot: left padding or a rejected draft.
            position_ids (`torch.LongTensor` of shape `(B, n)`): True positions, whatever slots hold the tokens.
            cache ([`~transformers.DynamicCache`]): Cache of `C` slots, changed in place.
            layer_ids (`Sequence[int]`): Layers to tap, ascending.
        """
        return self._forward(input_ids, attention_mask, position_ids, cache, layer_ids)

    @torch.no_grad()
    def score_branches(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, anchors: torch.Tensor, drafts: torch.Tensor
    ) -> torch.Tensor:
        """
        Return the target's hidden states on draft-induced states, in one packed forward.

        Each block's branch `d_1..d_{K-1}` is appended to the text; its tokens attend to the committed prefix up to
        their anchor and to their own branch, at the positions the drafts were proposed for.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Right-padded committed text.
            attention_mask (`torch.LongTensor` of shape `(B, L)`): 1 for text, 0 for padding.
            anchors (`torch.LongTensor` of shape `(B, A)`): Anchors; negative entries mark padding.
            drafts (`torch.LongTensor` of shape `(B, A, K)`): Drafts of each block.

        Returns:
            `torch.Tensor` of shape `(B, A, K, H)`: input of the head at the state `x, y_<=a, d_<k` for slot `k`.
        """
        self.require_rollback()
        B, L = input_ids.shape
        A, K = drafts.shape[1:]
        safe_anchors = anchors.clamp(min=0)
        offsets = torch.arange(1, K, device=input_ids.device)
        branch_positions = (safe_anchors[..., None] + offsets).flatten(1)
        packed_ids = torch.cat([input_ids, drafts[..., : K - 1].flatten(1)], dim=1)
        text_positions = torch.arange(L, device=input_ids.device).expand(B, L)
        mask = _branch_mask(attention_mask, safe_anchors, K - 1)
        dtype = self.causal_lm.dtype
        additive = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
        positions = torch.cat([text_positions, branch_positions], dim=1)
        hidden = self._forward(packed_ids, additive[:, None], positions, None, ()).last_hidden
        first = hidden[:, :L].gather(1, safe_anchors[..., None].expand(-1, -1, hidden.shape[-1]))
        later = hidden[:, L:].unflatten(1, (A, K - 1))
        return torch.cat([first[:, :, None], later], dim=2)

    def _forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache: DynamicCache | None,
        layer_ids: Sequence[int],
    ) -> TargetReading:
        with self._tapped(layer_ids) as taps:
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        last_hidden = output.last_hidden_state
        features = [taps[i] for i in layer_ids]
        return TargetReading(torch.cat(features, dim=-1) if features else last_hidden[..., :0], last_hidden)

    @contextmanager
    def _tapped(self, layer_ids: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collect the outputs of the chosen layers, and of no other, for one forward."""
        taps: dict[int, torch.Tensor] = {}

        def hook(index: int):
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                taps[index] = output[0] if isinstance(output, tuple) else output

            return keep

        handles = [self.layers[i].register_forward_hook(hook(i)) for i in layer_ids]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()

    def _find_layers(self) -> nn.ModuleList:
        for module in self.backbone.children():
            if isinstance(module, nn.ModuleList) and len(module) == self.config.num_hidden_layers:
                return module
        raise ValueError(
            f"Target of type {self.config.model_type!r} has no list of {self.config.num_hidden_layers} decoder layers in its backbone "
            f"{type(self.backbone).__name__}, so its features cannot be tapped. Only decoder-only targets of transformers are supported."
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Prove on three tokens that `project` reproduces the model's own logits."""
        probe = torch.arange(3, device=self.device)[None] % self.vocab_size
        expected = self.causal_lm(input_ids=probe, use_cache=False).logits
        hidden = self.backbone(input_ids=probe, use_cache=False).last_hidden_state
        actual = self.project(hidden)
        if actual.shape != expected.shape or not torch.allclose(
            actual.float(), expected.float(), rtol=1e-2, atol=1e-2
        ):
            raise ValueError(
                f"The head of target type {self.config.model_type!r} does something to its logits that this package does not know: "
                "they differ from the model's own. Distilling from it would be wrong; please report the family."
            )


def _branch_mask(attention_mask: torch.Tensor, anchors: torch.Tensor, width: int) -> torch.Tensor:
    """Return `(B, L + A * width, L + A * width)`, true where a packed query may see a key."""
    B, L = attention_mask.shape
    A = anchors.shape[1]
    device = attention_mask.device
    index = torch.arange(L, device=device)
    is_text = attention_mask.bool()
    mask = torch.zeros(B, L + A * width, L + A * width, dtype=torch.bool, device=device)
    # Padding queries see position 0 as well, because a row without any key turns into NaN.
    mask[:, :L, :L] = (index[:, None] >= index) & (is_text[:, None, :] | (index == 0))
    sees_prefix = index <= anchors[..., None]
    mask[:, L:, :L] = sees_prefix[:, :, None].expand(B, A, width, L).reshape(B, A * width, L)
    block = torch.arange(A, device=device).repeat_interleave(width)
    step = torch.arange(width, device=device).repeat(A)
    mask[:, L:, L:] = (block[:, None] == block) & (step[:, None] >= step)
    return mask
