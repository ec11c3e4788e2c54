#!/usr/bin/env bash
# Sourced by every test/*.sh: the environment of a run, and the hand-over to Python (flags.py, then run.py).
#
# A script sets Network, CaseKind (acc|perf), RankSize, its defaults and, if it has flags of its own, ExtraFlags, and
# in UnusedFlags those of the house that mean nothing to it; then `source launch.sh "$@"`, `require FLAG ...` and
# `launch SCRIPT.py ARGS...`, which is the last thing it does. The array on_restart holds what the command gets in
# addition when it starts again after a failure or a preemption, so that it goes on from the newest checkpoint.
#
#   --key=value and --key value, from any folder; an unknown flag is an error that names the nearest known one;
#   everything after a lone -- goes to the Python script unchanged.
#   Output: test/output/$ASCEND_DEVICE_ID/, with one train_<device id>.log a rank. Logs are appended to, never removed.
#   Exit code: the training's own; of several ranks, that of the one that failed first. 75: start me again (preempted).
set -euo pipefail
unset CDPATH PYTHONSAFEPATH # a cd that goes elsewhere and prints where; scripts that cannot import what lies beside them
export PYTHONUTF8=1         # files are written in UTF-8, whatever the locale

launch_dir=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
repo_root=$(realpath "$launch_dir/../..")
launcher_script=$(realpath "${BASH_SOURCE[-1]}") # what the user called
project_dir=$(realpath "$(dirname "$launcher_script")/..")

house_flags="data_path batch_size epochs max_steps device device_id nproc precision ckpt_path output_dir
  nnodes node_rank master_addr master_port rank_table_file devices_per_server hostfile cpu_bind
  max_restarts min_nodes collective_timeout"
switches="dry_run help profile deterministic dump_precision" # flags without a value
on_restart=()

die() {
  echo "error: $*" >&2
  exit 2
}

# Usage: in_python MODULE ARGS... ; in the foreground, from the repository's root, where it finds its modules.
in_python() {
  cd "$repo_root"
  exec python3 -m "common.launch.$1" "${@:2}"
}

# Sets every flag, the array pass_through, nproc, world_size and LAUNCH_PLAN, which run.py reads.
parse_flags() {
  local name values=() assignments usage="" here=$PWD
  command -v python3 >/dev/null || die "python3 is not on PATH: activate the environment with the requirements first"
  for name in $house_flags ${ExtraFlags:-} $switches; do values+=("$name=${!name-}"); done
  assignments=$(in_python flags "$here" "$launcher_script" "${RankSize:-1}" "${UnusedFlags:-}" "${#values[@]}" \
    "${values[@]}" "$@") || exit 2
  eval "$assignments"
  [[ -z $usage ]] || { printf '%s\n' "$usage"; exit 0; }
}

# Usage: require FLAG... ; stops when one has no value.
require() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || die "--$name is required: bash test/$(basename "$launcher_script") --$name=..."
  done
}

# Usage: launch SCRIPT.py ARGS... ; runs it on all ranks of this node and ends with its exit code.
launch() {
  local command=(python3 "$@")
  export ASCEND_DEVICE_ID=${device_id:-${ASCEND_DEVICE_ID:-0}}
  : "${output_dir:=$project_dir/test/output/$ASCEND_DEVICE_ID}"
  command+=(--output_dir "$output_dir" --device "$device" --case_kind "$CaseKind")
  [[ -z $precision ]] || command+=(--precision "$precision")
  [[ -z $max_steps ]] || command+=(--max_steps "$max_steps")
  [[ $profile != true ]] || command+=(--profile)
  command+=("${pass_through[@]}")
  if [[ $deterministic == true ]]; then # common/distributed.py reads the first, env_npu.sh the second
    export DETERMINISTIC=1 NPU_PRESET=${NPU_PRESET:-deterministic}
  fi
  [[ $dump_precision != true ]] || export DUMP_PRECISION=1 # common/profile/precision_dump.py
  if [[ $npu_is_meant == true && $dry_run != true && ${etp_running_flag:-} != true ]]; then
    source "$launch_dir/env_npu.sh"
  fi
  # in the environment, not as arguments: what is on a command line, tokens too, everyone on the host can read
  printf -v LAUNCH_COMMAND '%s\x1f' "${command[@]}"
  LAUNCH_ON_RESTART=""
  ((${#on_restart[@]} == 0)) || printf -v LAUNCH_ON_RESTART '%s\x1f' "${on_restart[@]}"
  export LAUNCH_PLAN LAUNCH_COMMAND LAUNCH_ON_RESTART
  local module=run
  [[ $dry_run != true ]] || module=commands
  in_python "$module" --network "$Network" --case_kind "$CaseKind" --batch_size "${batch_size:-0}" \
    --project_dir "$project_dir" --output_dir "$output_dir"
}

parse_flags "$@"
