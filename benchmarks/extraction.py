# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Tokens per second of the target's reading: by a vLLM server, its files and our checks included, and in this process, of
the same texts, in turns.

`trl-draft-opd read --print-server` prints the server's line. One core each: `taskset -c 0` before that line, `taskset
-c 1` before this one. Text is the questions and answers of a JSONL file.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from trl_draft_opd import FrozenTarget
from trl_draft_opd.readings.server import ReadingServers


def read_texts(target: FrozenTarget, path: Path, count: int) -> list[list[int]]:
    """Return the ids of chats of question and answer."""
    tokenizer: Any = target.tokenizer
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(count)]
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in chats]


def read_served(servers: ReadingServers, texts: Sequence[list[int]]) -> None:
    """Read texts on the server, as many at once as it takes."""
    with ThreadPoolExecutor(servers.concurrency) as pool:
        for text, states in zip(
            texts, pool.map(lambda text: servers.fetch(text, servers.layer_ids), texts), strict=True
        ):
            assert len(states.last_hidden) == len(text)


def read_in_process(target: FrozenTarget, layer_ids: Sequence[int], texts: Sequence[list[int]], at_once: int) -> None:
    """Read texts with the target in this process, as many at once as a training step does."""
    for begin in range(0, len(texts), at_once):
        rows = [torch.tensor(text, device=target.device) for text in texts[begin : begin + at_once]]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        target.read_text(pad_sequence(rows, batch_first=True), mask, layer_ids)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--shared-folder", type=Path, required=True)
    parser.add_argument("--target-layer-ids", type=int, nargs="+", required=True, help="as the server was started for")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with `question` and `answer`")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    target = FrozenTarget.load(args.target)
    servers = ReadingServers.connect(
        target, args.base_url, args.target_layer_ids, shared_folder=args.shared_folder, concurrency=args.at_once
    )
    # Texts of a round are new to the server, which keeps the prefixes of those that it has read.
    texts = read_texts(target, args.data, args.texts * (args.rounds + 1))
    rates: dict[str, list[float]] = {"vllm": [], "transformers": []}
    for number in range(args.rounds + 1):
        now = texts[number * args.texts : (number + 1) * args.texts]
        for name, run in (
            ("vllm", lambda now=now: read_served(servers, now)),
            ("transformers", lambda now=now: read_in_process(target, args.target_layer_ids, now, args.at_once)),
        ):
            begin = time.perf_counter()
            run()
            rates[name].append(sum(map(len, now)) / (time.perf_counter() - begin))
    servers.close()
    # The first round warms both.
    measured = {name: [round(rate, 1) for rate in found[1:]] for name, found in rates.items()}
    ratios = [ours / theirs for ours, theirs in zip(measured["vllm"], measured["transformers"], strict=True)]
    report = {
        "target": Path(args.target).name,
        "dtype": str(target.causal_lm.dtype),
        "layers": args.target_layer_ids,
        "texts_per_round": args.texts,
        "tokens": sum(map(len, texts[args.texts :])),
        "at_once": args.at_once,
        "vllm": servers.engine_version,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "tokens_per_second": measured,
        "median_tokens_per_second": {name: statistics.median(found) for name, found in measured.items()},
        "median_ratio": round(statistics.median(ratios), 3),
    }
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
