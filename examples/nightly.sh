#!/usr/bin/env bash
# Copyright 2026 The trl-draft-opd authors. Licensed under the Apache License, Version 2.0.
# A day of a server's log trains the drafter that was served; its last file measures it. docs/do/traffic.md explains.
#
#     bash examples/nightly.sh TARGET DRAFTER LOGS WORK [ORG/NAME [FLAGS OF opd]]
#
# Expect WORK/drafter, WORK/export and tau before and after; without ORG/NAME, or without a gain, nothing is pushed.
set -euo pipefail
umask 077
(($# >= 4)) || { sed -n 's/^#     /usage: /p' "$0" >&2; exit 2; }

target=$1 serving=$2                # the target, and the drafter that the server has now
logs=("$3"/*.jsonl*) work=$4        # a folder with the files of one day, and one to make
repo_id=${5:-}                      # where a better drafter goes
along=(--temperature 0.0 --top-k 0 --top-p 1.0 --max-completion-length 2048)
num_held_out=200
((${#logs[@]} >= 2)) || { echo "$3 needs two files or more: the last one is held out" >&2; exit 2; }
mkdir -p "$(dirname "$work")"; mkdir "$work"
trap 'rm -rf "$work/train" "$work/held-out"' EXIT  # they hold the text

# 1. Text of the target, to train on and to measure with. Exit code 1: the server drafts otherwise than this drafter.
trl-draft-opd import --log "${logs[@]::${#logs[@]}-1}" --target "$target" --drafter "$serving" "${along[@]}" \
    --output "$work/train" --json "$work/train.json"
trl-draft-opd import --log "${logs[-1]}" --target "$target" "${along[@]}" --output "$work/held-out"
held_out=(--target "$target" --dataset "$work/held-out")

# 2. On-policy distillation along it.
trl-draft-opd opd --target "$target" --drafter "$serving" --dataset "$work/train" --responses "$work/train" \
    "${along[@]}" --output-dir "$work/drafter" "${@:6}"

# 3. tau of both on the file that was held out, by replay.
replay=(evaluate "${held_out[@]}" --responses "$work/held-out" --num-prompts "$num_held_out" "${along[@]}")
trl-draft-opd "${replay[@]}" --drafter "$serving" --json "$work/before.json"
trl-draft-opd "${replay[@]}" --drafter "$work/drafter" --before "$work/before.json" --json "$work/after.json"

# 4. The export keeps in every engine what it kept in training. A gain whose interval is clear of zero is pushed.
trl-draft-opd export --drafter "$work/drafter" --target "$target" --output "$work/export" \
    ${repo_id:+--repo-id "$repo_id"}
trl-draft-opd verify --drafter "$work/export" --checkpoint "$work/drafter" "${held_out[@]}" --num-prompts 16
is_better='import json, sys; sys.exit(json.load(open(sys.argv[1]))["gain_in_tau"]["low"] <= 0)'
if python -c "$is_better" "$work/after.json" && [[ -n $repo_id ]]; then
    trl-draft-opd push --drafter "$work/export" --repo-id "$repo_id" --private
else
    echo "Nothing is pushed: no gain that is clear of zero, or no repository."
fi
