#!/usr/bin/env bash
# Sourced by every test/*.sh: the only argument parser, launcher and exit-code keeper in shell.
#
# A script sets Network, CaseKind (acc|perf), RankSize, its defaults and, if it has flags of its own, ExtraFlags;
# then `source launch.sh "$@"`, `require FLAG ...` and `launch SCRIPT.py ARGS...`.
#
#   --key=value and --key value, from the project folder or from test/; an unknown flag is an error that names the
#   nearest known one; everything after a lone -- goes to the Python script unchanged.
#   Output: test/output/$ASCEND_DEVICE_ID/, with one train_<device id>.log a rank. Logs are appended to, never removed.
#   Exit code: the training's own; of several ranks, that of the one that failed first.
set -euo pipefail

launch_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo_root=$(cd "$launch_dir/../.." && pwd)
launcher_script=$(cd "$(dirname "${BASH_SOURCE[-1]}")" && pwd)/$(basename "${BASH_SOURCE[-1]}") # as the user called it
project_dir=$(cd "$(dirname "$launcher_script")/.." && pwd)

house_flags="data_path batch_size epochs max_steps device device_id nproc precision ckpt_path output_dir
  nnodes node_rank master_addr master_port rank_table_file devices_per_server hostfile cpu_bind
  max_restarts min_nodes collective_timeout"
switches="dry_run help profile" # flags without a value
pass_through=()
given_flags=" "

die() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "$launcher_script"
  local flags
  read -r -a flags <<<"$(echo $house_flags ${ExtraFlags:-})"
  echo "Flags: $(printf -- '--%s= ' "${flags[@]}")--profile --dry_run --help; after a lone --, arguments for the Python script"
}

unknown_flag() {
  local nearest
  nearest=$(python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.5))' \
    "$1" $house_flags ${ExtraFlags:-} $switches)
  die "unknown flag --$1${nearest:+; did you mean --$nearest?} (--help lists all; Python options go after a lone --)"
}

parse_flags() {
  local name value
  for name in $house_flags ${ExtraFlags:-} $switches; do
    [[ -v $name ]] || printf -v "$name" ''
  done
  while (($#)); do
    if [[ $1 == -- ]]; then
      shift
      pass_through=("$@")
      break
    fi
    [[ $1 == --?* ]] || die "unexpected argument '$1': flags are written --key=value or --key value"
    name=${1%%=*}
    name=${name#--}
    if [[ " $switches " == *" $name "* ]]; then
      printf -v "$name" true
    elif [[ " ${house_flags//$'\n'/ } ${ExtraFlags:-} " != *" $name "* ]]; then
      unknown_flag "$name"
    else
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      else
        (($# > 1)) && [[ $2 != --* ]] || die "--$name needs a value"
        value=$2
        shift
      fi
      # a relative path is meant from where the user stands; Python runs in the project folder
      [[ $value != /* && -n $value && -e $value ]] && value=$(realpath "$value")
      printf -v "$name" '%s' "$value"
    fi
    given_flags+="$name "
    shift
  done
}

check_flags() {
  local name
  refuse_inherited_flags
  for name in batch_size epochs max_steps device_id nproc nnodes node_rank master_port devices_per_server max_restarts \
    min_nodes collective_timeout; do
    [[ -z ${!name} || ${!name} =~ ^(0|[1-9][0-9]*)$ ]] || die "--$name=${!name}: must be a whole number, such as 8"
  done
  [[ -z $data_path || -e $data_path ]] || die "--data_path=$data_path: no such file or folder"
  # a bare word such as mae_vit_base_p16 is a published name, which Python looks up
  [[ $ckpt_path != *[./]* || $ckpt_path == *://* || -e $ckpt_path ]] || die "--ckpt_path=$ckpt_path: no such file or folder"
  [[ ${device:=auto} =~ ^(auto|npu|cuda|cpu)$ ]] || die "--device=$device: choose auto, npu, cuda or cpu"
  [[ -z $precision || $precision =~ ^(fp32|bf16|fp16)$ ]] || die "--precision=$precision: choose fp32, bf16 or fp16"
  [[ ${cpu_bind:=auto} =~ ^(auto|off)$ ]] || die "--cpu_bind=$cpu_bind: choose auto or off"
  find_world
}

# A flag's shell variable must come from the script or the command line, never unseen from the environment.
refuse_inherited_flags() {
  local name
  for name in $(compgen -e); do
    [[ " ${house_flags//$'\n'/ } ${ExtraFlags:-} $switches " != *" $name "* || $given_flags == *" $name "* ]] ||
      die "the environment variable $name=${!name} has the name of a flag: unset $name, or give --$name on the command line"
  done
}

# Sets nnodes node_rank nproc world_size master_addr master_port, the arrays node_addresses node_nproc node_devices,
# and rank_variables where the user starts every rank himself: see world.py.
find_world() {
  if npu_is_meant && [[ -n ${RANK_TABLE_FILE:-} ]] && { ((${RankSize:-1} > 1)) || [[ -n ${RANK_ID:-} ]]; }; then
    [[ ${rank_table_file:=$RANK_TABLE_FILE} == "$RANK_TABLE_FILE" || $rank_table_file -ef $RANK_TABLE_FILE ]] ||
      die "--rank_table_file=$rank_table_file, but RANK_TABLE_FILE=$RANK_TABLE_FILE: give one file"
    rank_table_file=$(realpath -m "$rank_table_file")
  fi
  [[ -z $rank_table_file || -z $device_id ]] || die "--device_id=$device_id: the rank table says which devices are used"
  local world
  world=$(cd "$repo_root" && python3 -m common.launch.world --rank_table_file="$rank_table_file" \
    --devices_per_server="$devices_per_server" --hostfile="$hostfile" --nnodes="$nnodes" --node_rank="$node_rank" \
    --nproc="$nproc" --master_addr="$master_addr" --master_port="$master_port" --default_nproc="${RankSize:-1}" \
    --dry_run="$dry_run") || exit 2
  eval "$world"
  nproc=${node_nproc[node_rank]}
  check_elastic
}

# --max_restarts=N: after a failure all ranks start anew, N times, and go on from the newest checkpoint. On several nodes
# with torchrun's c10d rendezvous, where a node may leave and come back; with --min_nodes=K the run goes on without it.
check_elastic() {
  rendezvous=static
  [[ -z $min_nodes || -n $max_restarts ]] || die "--min_nodes=$min_nodes needs --max_restarts=N: how many losses to survive"
  ((${max_restarts:-0})) || return 0
  ((world_size > 1 && ${#rank_variables[@]} == 0)) || die "--max_restarts needs several ranks that this script starts"
  [[ -z $min_nodes ]] || ((min_nodes >= 1 && min_nodes <= nnodes)) || die "--min_nodes=$min_nodes: choose 1 to $nnodes"
  ((nnodes == 1)) || rendezvous=c10d
  if [[ -v resume && -z $resume ]]; then # else a run would begin anew after each failure
    resume=auto
    echo "note: --max_restarts means --resume=auto: from the newest checkpoint in the output folder, if there is one"
  fi
}

# Usage: require FLAG... ; stops when one has no value.
require() {
  local name
  for name in "$@"; do
    [[ -n ${!name} ]] || die "--$name is required: bash test/$(basename "$launcher_script") --$name=..."
  done
}

# Usage: show_devices LIST FLAG ; adds to `variables` what leaves only these cards visible to the run, in this order.
show_devices() {
  local kind variable
  for kind in npu:ASCEND_RT_VISIBLE_DEVICES cuda:CUDA_VISIBLE_DEVICES; do
    variable=${kind#*:}
    [[ -n $1 ]] && [[ $device == "${kind%%:*}" || $device == auto ]] || continue
    [[ -z ${!variable:-} || ${!variable} == "$1" ]] || die "$2, but $variable=${!variable}: set only one of them"
    variables+=("$variable=$1")
  done
}

npu_is_meant() {
  [[ $device == npu ]] || { [[ $device == auto ]] && [[ -e /dev/davinci_manager ]]; }
}

prepare() {
  export ASCEND_DEVICE_ID=${device_id:-${ASCEND_DEVICE_ID:-0}}
  : "${output_dir:=$project_dir/test/output/$ASCEND_DEVICE_ID}"
  [[ $output_dir == /* ]] || output_dir=$PWD/$output_dir
  mkdir -p "$output_dir" || die "--output_dir=$output_dir: cannot be created"
  if [[ -n $collective_timeout ]]; then
    export COLLECTIVE_TIMEOUT_S=$collective_timeout HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-$collective_timeout}
  fi
  if npu_is_meant && [[ ${etp_running_flag:-} != true ]]; then
    source "$launch_dir/env_npu.sh"
  fi
  if [[ -n $node_interface && -z ${GLOO_SOCKET_IFNAME:-} ]]; then # gloo would go by the host name, often 127.0.1.1
    export GLOO_SOCKET_IFNAME=$node_interface
    echo "GLOO_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME, the interface of ${node_addresses[node_rank]:-the way to $master_addr}"
  fi
  if [[ -z ${OMP_NUM_THREADS:-} ]] && ((nproc > 1)); then
    local cores
    cores=$(nproc_available)
    export OMP_NUM_THREADS=$((cores / nproc > 0 ? cores / nproc : 1))
  fi
}

nproc_available() { command nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# Ends the run's whole process tree: first politely (torchrun passes it on to the ranks), after 40 s by force.
end_run() {
  trap '' INT TERM
  local children waited=0
  children=$(descendants "$run_pid")
  kill -TERM -- "-$run_pid" 2>/dev/null || true
  while ((waited++ < 80)) && kill -0 "$run_pid" 2>/dev/null; do sleep 0.5; done
  kill -KILL -- "-$run_pid" $children 2>/dev/null || true
}

descendants() {
  local child
  for child in $(pgrep -P "$1" || true); do
    echo "$child"
    descendants "$child"
  done
}

# Usage: node_command NODE COMMAND... ; sets `run`, the command line that starts the ranks of that node.
node_command() {
  local node=$1 meeting=(--standalone) variables=()
  shift
  show_devices "${node_devices[node]}" "the rank table has devices ${node_devices[node]}"
  [[ -z $device_id ]] || ((nproc > 1)) || show_devices "$device_id" "--device_id=$device_id"
  if [[ $rendezvous == c10d ]]; then
    variables+=(-u RANK_TABLE_FILE) # ranks are dealt out at each meeting, the table's do not hold: HCCL goes without
  elif [[ -n $rank_table_file ]] && npu_is_meant; then
    variables+=("RANK_TABLE_FILE=$rank_table_file")
  fi
  variables+=("${rank_variables[@]}")
  run=("$@")
  if ((world_size > 1 && ${#rank_variables[@]} == 0)); then
    if [[ $rendezvous == c10d ]]; then
      meeting=(--nnodes "${min_nodes:-$nnodes}:$nnodes" --rdzv_backend c10d --rdzv_endpoint "$master_addr:$master_port"
        --rdzv_id "$Network" --rdzv_conf "is_host=$((node == 0))")
      local address=${node_addresses[node]}
      ((node != node_rank)) || address=${address:-$own_address}
      [[ -z $address ]] || meeting+=(--local_addr "$address")
    elif ((nnodes > 1)); then
      meeting=(--nnodes "$nnodes" --node_rank "$node" --master_addr "$master_addr" --master_port "$master_port")
    fi
    if ((${max_restarts:-0})); then
      meeting+=(--max_restarts "$max_restarts")
      # else a restart meets in the failed attempt's store, with its dead ranks' addresses (pytorch issue 167288)
      variables+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    fi
    run=(python3 -m torch.distributed.run "${meeting[@]}" --nproc_per_node "${node_nproc[node]}" --no_python "$@")
  fi
  ((${#variables[@]} == 0)) || run=(env "${variables[@]}" "${run[@]}")
}

# What would run, on every node; of a rank that the user starts himself, that one.
print_commands() {
  local node
  for node in "${!node_nproc[@]}"; do
    ((${#rank_variables[@]} == 0 || node == node_rank)) || continue
    ((nnodes == 1)) || echo "# node $node${node_addresses[node]:+, ${node_addresses[node]}}"
    node_command "$node" "$@"
    printf 'cd %q && ' "$project_dir"
    printf '%q ' "${run[@]}"
    echo
  done
}

# Usage: launch SCRIPT.py ARGS... ; runs it on all ranks of this node and exits with its exit code.
launch() {
  prepare
  local command=(python3 "$@" --output_dir "$output_dir" --device "$device" --case_kind "$CaseKind")
  [[ -z $precision ]] || command+=(--precision "$precision")
  [[ -z $max_steps ]] || command+=(--max_steps "$max_steps")
  [[ $profile != true ]] || command+=(--profile)
  command+=("${pass_through[@]}")
  command=(bash "$launch_dir/run_rank.sh" "${command[@]}")
  if [[ $dry_run == true ]]; then
    print_commands "${command[@]}"
    return 0
  fi

  export LAUNCH_LOG_DIR=$output_dir LAUNCH_CPU_BIND=$cpu_bind
  LAUNCH_STATUS_DIR=$(mktemp -d)
  export LAUNCH_STATUS_DIR
  if [[ -t 2 ]]; then export PROGRESS_BAR=1; fi
  node_command "$node_rank" "${command[@]}"
  cd "$project_dir"
  set -m # the run gets a process group of its own, which a signal then ends as a whole
  "${run[@]}" </dev/null &
  run_pid=$!
  set +m
  trap 'end_run; report_failure 143; exit 143' TERM
  trap 'end_run; report_failure 130; exit 130' INT
  local code=0
  wait "$run_pid" || code=$?
  trap - INT TERM
  ((code == 0)) || { report_failure "$code"; code=$failed_code; }
  rm -rf "$LAUNCH_STATUS_DIR"
  exit "$code"
}

# Finds the rank that failed first (one ended by torchrun's signal did not fail by itself), shows its last lines, and
# writes Status = FAILED where Python could not. Sets failed_code.
report_failure() {
  failed_code=$1
  local status rank="" log
  for status in $(ls -tr "$LAUNCH_STATUS_DIR" 2>/dev/null); do
    local code log_id
    read -r code log_id <"$LAUNCH_STATUS_DIR/$status"
    if [[ $code != 0 && ($code != 143 || -z $rank) ]]; then
      rank=$status log=$output_dir/train_$log_id.log
      [[ $code == 143 ]] || { failed_code=$code; break; }
    fi
  done
  if [[ $failed_code == 143 || $failed_code == 130 ]]; then
    echo "error: the run was ended by a signal; logs: $output_dir/train_*.log" >&2
  elif [[ -n $rank ]]; then
    echo "error: rank $rank failed with exit code $failed_code; last lines of $log:" >&2
    # of this run only: earlier runs are in the same file
    awk '/^==== /{lines = ""} {lines = lines $0 "\n"} END {printf "%s", lines}' "$log" | tail -n 15 | sed 's/^/  | /' >&2
  else
    echo "error: the run ended with exit code $failed_code; logs: $output_dir/train_*.log" >&2
  fi
  (cd "$repo_root" && python3 -m common.result_file failed --output_dir "$output_dir" --network "$Network" \
    --batch_size "${batch_size:-0}" --ranks "$world_size" --case_kind "$CaseKind" \
    --error "exit code $failed_code, see train_*.log") || true
}

parse_flags "$@"
if [[ $help == true ]]; then
  usage
  exit 0
fi
check_flags
