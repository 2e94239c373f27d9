# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""The line that starts a server of readings is taken by the parser of the real `vllm serve`."""

import shlex

import pytest

from trl_draft_opd.readings.launch import serve_line


@pytest.mark.conformance
def test_vllm_serve_takes_every_word_of_the_line():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    line = serve_line(
        "org/model",
        [1, 17, 32],
        36,
        shared_folder="/dev/shm/states",
        dtype="bfloat16",
        max_model_len=4097,
        trust_remote_code=True,
    )
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])
    assert arguments.model_tag == "org/model"
    assert (arguments.max_model_len, arguments.dtype) == (4097, "bfloat16")
    states = arguments.speculative_config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"]
    assert states == [2, 18, 33, 36]
    assert str(arguments.kv_transfer_config).count("ExampleHiddenStatesConnector")
