# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
vLLM's connector for hidden states, mended for a machine without a GPU: the stock one copies through pinned memory and
CUDA streams. A server loads it by `"kv_connector_module_path": "helpers.cpu_hidden_states"`; what it writes, and when
the lock is let go, is as in the stock one.
"""

import os

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class _Done:
    """Stands where the stock connector keeps the event of a copy: here the file is there already."""

    def query(self) -> bool:
        return True


class CpuHiddenStatesConnector(ExampleHiddenStatesConnector):
    """Writes a request's states at once."""

    def _submit_async_write(self, pending: PendingSave) -> None:
        if not self._is_tp_rank_zero:
            return
        blocks, offsets = torch.tensor(pending.block_ids), torch.arange(self._block_size)
        slots = (blocks[:, None] * self._block_size + offsets).flatten()
        states = extract_from_kv_cache(self._kv_cache, slots, len(pending.token_ids))
        lock = self._lock_fds.pop(pending.req_id, None)
        try:
            save_file({"hidden_states": states, "token_ids": pending.token_ids.clone()}, pending.filename)
        finally:
            if lock is not None:
                os.close(lock)
        self._req_copy_events[pending.req_id] = _Done()
