# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Which target and drafter fit where: tables of memory per stage and per launch, held against what runs.

    python -m benchmarks.scaling               # the tables of docs/do/scaling.md, as markdown
    python -m benchmarks.scaling --stages llama3-70b                    # the stages of another target
    python -m benchmarks.scaling --check       # computed against counted, a 7 M pair on the CPU
    python -m benchmarks.scaling --measure qwen3-0.6b --family eagle3   # against measured, random weights on a GPU

The arithmetic is in `trl_draft_opd/costs/memory.py`.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.counters import PeakBytes
from trl_draft_opd import DraftVocabulary, FrozenTarget, SamplingSettings
from trl_draft_opd.costs.memory import LAUNCHES, NUM_RANKS, Stages, Workload, count_stages, gib, launch_bytes
from trl_draft_opd.costs.shapes import TARGETS, DrafterShape, TargetShape
from trl_draft_opd.drafters.auto import DRAFTER_CLASSES
from trl_draft_opd.drafters.base import Drafter, run_blocks
from trl_draft_opd.losses import default_chunk_bytes
from trl_draft_opd.rollout.blocks import BlockBatch, sample_anchors
from trl_draft_opd.rollout.drafting import DraftingSettings
from trl_draft_opd.rollout.keyed_random import DrawKeys
from trl_draft_opd.rollout.live import rollout_live
from trl_draft_opd.rollout.replay import TargetText
from trl_draft_opd.target.reading import TextReading
from trl_draft_opd.trainer.step import Objective, PreparedBatch, SlotRules, StreamSettings, step_loss, weight_sums
from trl_draft_opd.utils.versions import switch_checkpointing


# The columns of all tables.
FAMILIES = ("eagle3", "dflash", "dspark", "dflash2")
DRAFT_VOCABULARY = 32_000
# Small enough for a test; the loss in chunks of 1 MiB, so that a chunk is no more than is needed.
CHECKED = Workload(
    rows=2, length=256, blocks=40, accumulation=1, checkpointing=False, chunk_bytes=2**20, is_on_cpu=True
)
STREAMS = {"accepted": StreamSettings("forward_kl", 1.0, 1.0), "rejected": StreamSettings("reverse_kl", 0.0, 1.0)}


def make_target(name: str, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a target of a published shape with random weights on `device`."""
    return make_target_of(TARGETS[name], device, dtype)


def make_target_of(shape: TargetShape, device: torch.device | str, dtype: torch.dtype) -> PreTrainedModel:
    """Return a target of any shape with random weights on `device`."""
    config_class, model_class = (
        (Qwen3Config, Qwen3ForCausalLM) if shape.has_head_norms else (LlamaConfig, LlamaForCausalLM)
    )
    config = config_class(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=40960,
        tie_word_embeddings=shape.is_tied,
        dtype=dtype,
    )
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def make_drafter(
    family: str, target: PreTrainedModel, device: torch.device | str, draft_vocab: int | None = DRAFT_VOCABULARY
) -> Drafter:
    """
    Return a drafter as published for the target: EAGLE-3 with a draft vocabulary where the target's is larger, or with
    all of it where there is no `draft_vocab`.
    """
    kind, vocab = DRAFTER_CLASSES[family], target.config.vocab_size
    with torch.device(device):
        if kind.config_class.drafts_whole_blocks:
            return kind.from_target(target, mask_token_id=vocab - 1)
        vocabulary = None
        if draft_vocab is not None and vocab > draft_vocab:
            is_drafted = torch.arange(vocab) < draft_vocab
            vocabulary = DraftVocabulary(torch.zeros(draft_vocab, dtype=torch.long), is_drafted, coverage=1.0)
        return kind.from_target(target, draft_vocabulary=vocabulary)


@cache
def shape_of(family: str, target: TargetShape, draft_vocab: int | None = None) -> DrafterShape:
    """Return the sizes of what [`make_drafter`] makes for a target of this shape; no weight is made."""
    model = make_target_of(target, "meta", torch.bfloat16)
    return DrafterShape.of(make_drafter(family, model, "meta", draft_vocab).config)


def pair_of(name: str, family: str) -> tuple[TargetShape, DrafterShape]:
    """Return the sizes of what [`make_target`] and [`make_drafter`] make."""
    return TARGETS[name], shape_of(family, TARGETS[name], DRAFT_VOCABULARY)


def workload_of(family: str, *, rows: int = 2, length: int = 2048, prompt: int = 512) -> Workload:
    """Return the tables' workload: responses of 1536 tokens, tau 3 for EAGLE-3 and 5 for blocks, 8 micro-batches."""
    tau = 5 if DRAFTER_CLASSES[family].config_class.drafts_whole_blocks else 3
    return Workload(rows, length, (length - prompt) // tau, 8, False)


# -- one micro-batch, stage by stage ----------------------------------------------------------------------------------


@dataclass
class Scene:
    """A pair with a micro-batch of random text; stages are run one by one, in the order of their methods."""

    target: FrozenTarget
    drafter: Drafter
    work: Workload
    optimizer: torch.optim.Optimizer
    input_ids: torch.Tensor
    anchors: BlockBatch
    reading: TextReading | None = None
    loss: torch.Tensor | None = None

    @classmethod
    def make(cls, target: FrozenTarget, family: str, work: Workload) -> "Scene":
        """Make the drafter, its optimizer, and text whose last three quarters are response."""
        device = target.device
        drafter = make_drafter(family, target.causal_lm, device).train()
        if work.checkpointing:
            switch_checkpointing(drafter, "enable")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, target.vocab_size - 1, (work.rows, work.length), generator=generator).to(device)
        is_response = (torch.arange(work.length, device=device) >= work.length // 4).expand_as(ids)
        anchors = sample_anchors(
            ids,
            is_response,
            range(work.rows),
            num_anchors=work.blocks,
            num_drafts=drafter.default_num_drafts,
            seed=0,
            epoch=0,
        )
        return cls(target, drafter, work, torch.optim.AdamW(drafter.parameters()), ids, anchors)

    def autocast(self) -> torch.autocast:
        """Return the context that training with `bf16` runs in."""
        return torch.autocast(self.target.device.type, torch.bfloat16)

    def read(self) -> None:
        """Have the target read the text."""
        mask = torch.ones_like(self.input_ids)
        with self.autocast():
            self.reading = self.target.read_text(self.input_ids, mask, self.drafter.config.target_layer_ids)

    def draft(self) -> torch.Tensor:
        """Run the blocks with gradient; the caller is inside of `autocast`."""
        return run_blocks(
            self.drafter,
            self.reading.padded().features,
            self.input_ids,
            self.anchors.anchors,
            self.anchors.drafts,
            self.target.embed,
        )

    def forward(self) -> None:
        """Compute the loss as the trainers do."""
        sums = weight_sums([self.anchors], STREAMS, self.drafter.draft_token_ids)
        mask = torch.ones_like(self.input_ids)
        text = TargetText(self.input_ids, mask, mask.bool(), range(len(mask)))
        batch = PreparedBatch(text, None, self.anchors, self.reading)
        with self.autocast():
            objective = Objective(STREAMS, SlotRules(), self.work.chunk_bytes, sums)
            self.loss = step_loss(self.drafter, self.target, batch, objective).loss

    def backward(self) -> None:
        """Fill the gradients."""
        self.loss.backward()
        self.loss = None

    def update(self) -> None:
        """Update the drafter; the first call makes AdamW's moments."""
        self.optimizer.step()

    def live(self, max_completion_length: int) -> None:
        """Decode a few tokens behind the whole text: caches are as long as training makes them."""
        greedy = SamplingSettings(temperature=0.0, top_k=0, top_p=1.0)
        settings = DraftingSettings(self.drafter.default_num_drafts, greedy, "greedy", keep_branch_hidden=False)
        with self.autocast():
            rollout_live(
                self.target,
                self.drafter,
                self.input_ids.tolist(),
                settings,
                DrawKeys(0, 0, range(self.work.rows)),
                max_completion_length=max_completion_length,
                eos_token_ids=(),
            )


# -- held against the dispatcher, on the CPU --------------------------------------------------------------------------


def count_on_cpu(name: str, family: str, work: Workload) -> list[tuple[str, int, int]]:
    """
    Run a micro-batch on the CPU and return `(stage, computed bytes, counted bytes)`.

    Counted are storages, by torch's dispatcher: the same value on every run.
    """
    target = FrozenTarget(make_target(name, "cpu", torch.bfloat16))
    scene = Scene.make(target, family, work)
    stages = count_stages(*pair_of(name, family), work)
    parameters = list(scene.drafter.parameters())
    with PeakBytes() as reading:
        scene.read()
    with PeakBytes() as drafting, scene.autocast():
        hidden = scene.draft()
        kept = drafting.alive
    del hidden
    scene.forward()
    scene.backward()
    gradients = sum(p.grad.nbytes for p in parameters)
    # Once more: gradients are there already, as in all micro-batches but the first.
    with PeakBytes() as stepping:
        scene.forward()
        scene.backward()
    scene.update()
    moments = sum(s[key].nbytes for s in scene.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    cache = DynamicCache(config=target.config)
    ones = torch.ones_like(scene.input_ids)
    positions = torch.arange(work.length).expand_as(ones)
    with torch.no_grad(), scene.autocast():
        read = target.step(scene.input_ids, ones, positions, cache, scene.drafter.config.target_layer_ids)
        own = scene.drafter.encode_context(read.features, scene.input_ids, positions, target.embed)
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    cached += [*own.keys, *own.values, *([] if own.fused is None else [own.fused])]
    return [
        ("target", stages.target, sum(p.nbytes for p in target.causal_lm.parameters())),
        ("target's gradients and optimizer state", 0, sum(p.grad is not None for p in target.causal_lm.parameters())),
        ("drafter's masters", stages.masters, sum(p.nbytes for p in parameters)),
        ("drafter's gradients", stages.gradients, gradients),
        ("AdamW's moments", stages.adamw, moments),
        ("target's forward and reading", stages.forward + stages.readings // work.accumulation, reading.peak),
        ("target's reading", stages.readings // work.accumulation, scene.reading.num_bytes),
        ("activations and casts", stages.casts + stages.kept, kept),
        ("loss and backward", stages.casts + stages.update, stepping.peak),
        ("live caches", stages.cache, sum(tensor.nbytes for tensor in cached)),
    ]


# -- held against a GPU -----------------------------------------------------------------------------------------------


def measure_on_gpu(name: str, family: str, work: Workload) -> list[tuple[str, int | None, int, float]]:
    """
    Run a micro-batch on the GPU with random weights; return `(stage, computed bytes, peak bytes, seconds)`.

    Peaks are of `torch.cuda.max_memory_allocated`, everything alive included; so are the computed ones.
    """
    rows: list[tuple[str, int | None, int, float]] = []

    def run(stage: str, computed: int | None, action: Callable[[], object]) -> object:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        result = action()
        torch.cuda.synchronize()
        rows.append((stage, computed, torch.cuda.max_memory_allocated(), time.perf_counter() - begun))
        return result

    stages = count_stages(*pair_of(name, family), work)
    target = FrozenTarget(run("target made", stages.target, lambda: make_target(name, "cuda", torch.bfloat16)))
    fixed = stages.target + stages.masters
    scene: Scene = run("drafter made", fixed, lambda: Scene.make(target, family, work))
    run("target reads the text", fixed + stages.readings + stages.forward, scene.read)
    fixed += scene.reading.num_bytes
    loss = stages.casts + stages.kept + stages.loss
    run("loss", fixed + loss, scene.forward)
    # At most: gradients come into being as activations go.
    run("backward", fixed + stages.casts + stages.update + stages.gradients, scene.backward)
    # AdamW's own temporaries: it updates all tensors together.
    run("first update", fixed + stages.gradients + 2 * stages.adamw, scene.update)
    fixed += stages.adamw + stages.gradients
    run("second loss", fixed + loss, scene.forward)
    run("second backward", fixed + stages.casts + stages.update, scene.backward)
    scene.optimizer.zero_grad(set_to_none=True)
    scene.reading = None
    run("live rollout, 16 tokens", None, lambda: scene.live(16))
    return rows


# -- tables -----------------------------------------------------------------------------------------------------------


def stages_of(name: str, family: str, checkpointing: bool = False) -> Stages:
    """Return the stages of a shape under the tables' workload."""
    work = replace(workload_of(family), checkpointing=checkpointing)
    return count_stages(*pair_of(name, family), work)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table, its first column to the left."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def stage_table(name: str) -> str:
    """Return the table of stages on one GPU, all families."""
    found = [stages_of(name, family) for family in FAMILIES]
    again = [stages_of(name, family, checkpointing=True) for family in FAMILIES]
    rows = []
    for index, (label, _) in enumerate(found[0].rows()):
        rows.append([label, *(gib(stages.rows()[index][1]) for stages in found)])
        if label.startswith("activations"):
            rows.append(["… with `activation_checkpointing=True`", *(gib(stages.activations) for stages in again)])
    rows.append(["**peak on one GPU**", *(f"**{gib(launch_bytes(s, LAUNCHES[0], 1))}**" for s in found)])
    return markdown([f"{name}, GiB", *titles()], rows)


def titles() -> list[str]:
    """Return the heads of the families' columns."""
    return [DRAFTER_CLASSES[family].config_class.title for family in FAMILIES]


def launch_table(family: str, names: list[str]) -> str:
    """Return the table of peaks per GPU, launches against targets."""
    stages = {name: stages_of(name, family) for name in names}
    rows = [[launch, *(gib(launch_bytes(stages[n], launch, NUM_RANKS)) for n in names)] for launch in LAUNCHES]
    return markdown([f"{family}, GiB per GPU ({NUM_RANKS} GPUs)", *names], rows)


def tables() -> list[str]:
    """Return the tables of docs/do/scaling.md whose target is in process."""
    names = [name for name in TARGETS if name != "qwen3-7m"]
    return [stage_table("qwen3-8b"), *(launch_table(family, names) for family in FAMILIES[:2])]


def main() -> None:
    """Print what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count a 7 M pair on the CPU")
    parser.add_argument("--stages", choices=list(TARGETS), help="the stages of this target alone")
    parser.add_argument("--measure", choices=list(TARGETS), help="measure a pair of this shape on the GPU")
    parser.add_argument("--family", choices=FAMILIES, default="eagle3")
    parser.add_argument("--checkpointing", action="store_true", help="with activation checkpointing")
    args = parser.parse_args()
    if args.measure and not torch.cuda.is_available():
        parser.error("`--measure` needs a CUDA device, and there is none here. Leave it out for what is computed.")
    if args.check:
        for family in FAMILIES:
            counted = count_on_cpu("qwen3-7m", family, replace(CHECKED, checkpointing=args.checkpointing))
            rows = [[s, f"{a:,}", f"{b:,}"] for s, a, b in counted]
            print(markdown([f"qwen3-7m, {family}, bytes", "computed", "counted"], rows) + "\n")
    elif args.stages:
        print(stage_table(args.stages))
    elif args.measure:
        chunk_bytes = default_chunk_bytes("cuda")
        work = replace(workload_of(args.family), checkpointing=args.checkpointing, chunk_bytes=chunk_bytes)
        measured = measure_on_gpu(args.measure, args.family, work)
        rows = [[s, "" if a is None else gib(a), gib(b), f"{t:.2f}"] for s, a, b, t in measured]
        device = torch.cuda.get_device_name()
        print(markdown([f"{args.measure}, {args.family}, {device}", "computed GiB", "peak GiB", "seconds"], rows))
    else:
        print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
