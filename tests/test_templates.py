# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
"""
Templates that read a clock: one day on all days, in every command, store and run; and nothing else of them changes.
"""

from dataclasses import MISSING, fields
from datetime import datetime
from functools import partial

import pytest
from datasets import Dataset

from helpers.chats import CHATML, DATE_BY_DEFAULT, PRINTS_DATE, chat, make_tokenizer, move_clock, noted, prompts_of
from helpers.tiny import TEMPLATE, TINY_RUN, make_drafter, make_target
from trl_draft_opd import DraftOPDConfig, DraftOPDTrainer, DraftSFTConfig, DraftSFTTrainer
from trl_draft_opd.cli.decoding import EvaluateArguments, GenerateArguments
from trl_draft_opd.cli.publishing import VerifyArguments
from trl_draft_opd.data.templates import STANDING_DAY, ChatTemplate, read_template
from trl_draft_opd.responses import ResponseStore, write_responses
from trl_draft_opd.rollout.acceptance import SamplingSettings


ROWS = [chat(("user", "Hi."), ("assistant", "Hello."))]


@pytest.fixture
def set_day(monkeypatch):
    """Return a function that sets the day that templates are told it is."""

    return partial(move_clock, monkeypatch)


def test_a_template_that_prints_the_date_reads_one_day_on_all_days_and_says_so_once(set_day):
    for template, words in ((PRINTS_DATE, "Today is 01 January 2026\n"), (DATE_BY_DEFAULT, "Date: 01 Jan 2026\n")):
        found = []
        for day in ("2026-11-28", "2026-11-29"):
            set_day(day)
            # The clock of the test is the one that templates read.
            assert (
                make_tokenizer(PRINTS_DATE).apply_chat_template(ROWS[0]["messages"], tokenize=False)[9:11] == day[-2:]
            )
            texts, notes = noted(lambda template=template: prompts_of(ROWS * 2, template))
            assert words in texts[0]
            assert [note for note in notes if "repeat" not in note] == [
                "The chat template prints the date. It reads 2026-01-01 on every day, so that stored responses and "
                'resumed runs agree. To set another: `chat_template_kwargs={"strftime_now": "2026-01-01"}`.'
            ]
            found.append(texts)
        assert found[0] == found[1]


def test_a_day_that_was_set_is_read_in_silence():
    for settings, words in (
        ({"chat_template_kwargs": {"strftime_now": "2027-05-03"}}, "Date: 03 May 2027\n"),
        ({"chat_template_kwargs": {"date_string": "on Monday"}}, "Date: on Monday\n"),
    ):
        texts, notes = noted(lambda settings=settings: prompts_of(ROWS, DATE_BY_DEFAULT, **settings))
        assert words in texts[0] and notes == []
    # A row's own day comes first.
    row = {**ROWS[0], "chat_template_kwargs": {"strftime_now": "2027-05-03"}}
    assert "Today is 03 May 2027" in prompts_of([row], PRINTS_DATE)[0]
    with pytest.raises(ValueError, match='`chat_template_kwargs={"strftime_now": ...}` must be a date like'):
        prompts_of(ROWS, PRINTS_DATE, chat_template_kwargs={"strftime_now": "tomorrow"})


@pytest.mark.parametrize("lead", ["", "\n", "\n\n", "  ", "  \n ", "\t"])
@pytest.mark.parametrize("body", [CHATML, "{%- set x = 1 -%}\n" + CHATML, "text " + CHATML, "{# note #}\n" + CHATML])
def test_nothing_else_of_a_template_changes_when_its_clock_stands(set_day, lead, body):
    set_day(STANDING_DAY)
    template = lead + body + "{{ strftime_now('%A %-d %B %Y, %H:%M') }}"
    tokenizer = make_tokenizer(template)
    messages = ROWS[0]["messages"]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    assert ChatTemplate(tokenizer).render(messages, add_generation_prompt=False) == expected


@pytest.mark.parametrize("code", [*"aAwdbBmyYHIpMSfjUWcxXGuVzZFTe", "-d", "-m", "-H", "-j", "%"])
@pytest.mark.parametrize("day", [STANDING_DAY, "2027-11-30"])
def test_a_standing_clock_writes_what_python_writes(day, code):
    template = ChatTemplate(make_tokenizer("[{{ strftime_now('%" + code + " | %Y') }}]"), None, {"strftime_now": day})
    expected = datetime.fromisoformat(day).strftime(f"[%{code} | %Y]")
    assert template.render(ROWS[0]["messages"], add_generation_prompt=False) == expected


# A word of the tiny vocabulary that tells the day: w27 or w28.
TINY_DATE = "{{ 'w2' + strftime_now('%d')[1:] + ' ' }}" + TEMPLATE
TINY_ROWS = [chat(("user", f"w{30 + i}"), ("assistant", "w9 w10 w11")) for i in range(4)]
STORE = {"sampling": SamplingSettings(temperature=0.0, top_k=0, top_p=1.0), "max_completion_length": 8}


def dated_target():
    target = make_target()
    target.tokenizer.chat_template = TINY_DATE
    return target


@pytest.mark.parametrize("method", ["sft", "opd"])
def test_responses_that_were_stored_one_day_serve_the_next(tmp_path, set_day, monkeypatch, method):
    target, rows = dated_target(), Dataset.from_list(TINY_ROWS)
    set_day("2026-11-27")
    store = write_responses(target, rows, tmp_path / "store", **STORE, show_progress=False)
    set_day("2026-11-28")
    written = []
    monkeypatch.setattr(ResponseStore, "add", lambda self, *given: written.append(given))
    settings = {
        **TINY_RUN,
        "responses": str(store.path),
        "max_completion_length": 8,
        "max_steps": 1,
        "temperature": 0.0,
    }
    drafter = make_drafter("eagle3", target)
    if method == "sft":
        config = DraftSFTConfig(str(tmp_path / "out"), regenerate=True, **settings)
        DraftSFTTrainer(drafter, target, config, rows).train()
    else:
        DraftOPDTrainer(drafter, target, DraftOPDConfig(str(tmp_path / "out"), **settings), rows).train()
    assert written == []


def test_a_run_goes_on_the_next_day(tmp_path, set_day):
    target, rows = dated_target(), Dataset.from_list(TINY_ROWS)
    for day, max_steps in (("2026-11-27", 1), ("2026-11-28", 2)):
        set_day(day)
        config = DraftSFTConfig(
            str(tmp_path), **TINY_RUN, max_steps=max_steps, save_steps=1, per_device_train_batch_size=2
        )
        trainer = DraftSFTTrainer(make_drafter("eagle3", target), target, config, rows)
        trainer.train(resume_from_checkpoint=max_steps == 2)
    assert trainer.state.global_step == 2


# -- a template of the user's own -------------------------------------------------------------------------------------


def test_a_chat_template_is_read_from_its_file_and_a_path_is_never_a_template(tmp_path):
    """Whether it comes by a config, by the reader of a target or by the flag of a command."""
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE, "utf-8")
    assert DraftSFTConfig(str(tmp_path / "out"), chat_template=str(file), **TINY_RUN).chat_template == TEMPLATE
    assert DraftSFTConfig(str(tmp_path / "out"), chat_template=TEMPLATE, **TINY_RUN).chat_template == TEMPLATE
    assert make_target().text_reader(chat_template=str(file)).chat_template == TEMPLATE
    for value, words in (
        (f"{tmp_path}/onw.jinja", f"is neither. Did you mean '{file}'"),
        ("nothere.jinja", "'nothere.jinja' is neither"),
        ("chatml", "must be the text of a Jinja template, .* 'chatml' is neither"),
        (str(tmp_path), "is neither"),
    ):
        for read in (lambda v: DraftOPDConfig(str(tmp_path), chat_template=v, **TINY_RUN), read_template):
            with pytest.raises(ValueError, match=words):
                read(value)
    file.write_text("no template at all", "utf-8")
    with pytest.raises(ValueError, match="holds no Jinja template"):
        read_template(str(file))


@pytest.mark.parametrize("arguments", [EvaluateArguments, GenerateArguments, VerifyArguments])
def test_every_command_that_reads_prompts_takes_a_chat_template(tmp_path, arguments):
    (tmp_path / "own.jinja").write_text("{{ messages }}", "utf-8")
    names = {each.name for each in fields(arguments) if each.default is MISSING}
    given = dict.fromkeys(names, "x")
    read = arguments(**given, chat_template=str(tmp_path / "own.jinja")).reading(9)
    assert make_target().text_reader(**read).chat_template == "{{ messages }}"
    with pytest.raises(ValueError, match="'nothere.jinja' is neither"):
        arguments(**given, chat_template="nothere.jinja")
