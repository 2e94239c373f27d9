# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The `vllm serve` line of a server that extracts hidden states, and what its numbers of layers mean. Knows no network.

vLLM counts states and not layers: `0` is the embedding's output and `i` the output of our layer `i - 1`, so that `N`,
of N layers, is the output of the last one, before the final norm. It delivers states in ascending order whatever the
order asked for, repeats a layer for a number beyond N, and stops at its first request when a number comes twice.
Source: vLLM 0.32, `vllm/config/speculative.py`, `vllm/v1/spec_decode/extract_hidden_states.py` and
`vllm/distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py`.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path


def served_states(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """
    Return the numbers, ascending, under which vLLM delivers our `layer_ids` and, as the last, the input of the final
    norm; where the last layer is tapped, it is both.

    Raises:
        ValueError: If a layer is not one of the target's.
    """
    wrong = [layer for layer in layer_ids if not 0 <= layer < num_layers]
    if wrong:
        raise ValueError(f"The target's layers are 0 to {num_layers - 1}, and {wrong} are not among them.")
    return sorted({layer + 1 for layer in layer_ids} | {num_layers})


def serve_line(
    target: str,
    layer_ids: Sequence[int],
    num_layers: int,
    *,
    shared_folder: str | Path,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
) -> str:
    """
    Return the command, on one line and quoted for a shell, that serves a target's readings at `layer_ids`.

    Args:
        target (`str`): Hub id or path, as the server's machine finds it.
        layer_ids (`Sequence[int]`): Layers to tap, as the drafter counts them, from 0.
        num_layers (`int`): Decoder layers of the target.
        shared_folder (`str` or `Path`):
            Folder, as the server's machine sees it, where states wait until they are fetched; best in memory, such as
            below `/dev/shm`.
        dtype (`str`, *optional*, defaults to `"auto"`): Precision to compute in; the run's target must have the same.
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*, defaults to `8000`):
            Where it listens; vLLM's own default is every interface of the machine.
        max_model_len (`int`, *optional*): Most tokens of a text, plus one. Defaults to what the target's config says.
        trust_remote_code (`bool`, *optional*, defaults to `False`): As in `transformers`.

    Raises:
        ValueError: If a layer is not one of the target's.
    """
    extraction = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {
            "hf_config": {"eagle_aux_hidden_state_layer_ids": served_states(layer_ids, num_layers)}
        },
    }
    transfer = {
        "kv_connector": "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": str(shared_folder)},
    }
    words = ["vllm", "serve", target, "--host", host, "--port", str(port), "--dtype", dtype]
    if max_model_len is not None:
        words += ["--max-model-len", str(max_model_len)]
    if trust_remote_code:
        words += ["--trust-remote-code"]
    words += ["--speculative-config", json.dumps(extraction), "--kv-transfer-config", json.dumps(transfer)]
    return shlex.join(words)
