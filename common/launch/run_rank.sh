#!/usr/bin/env bash
# Runs one rank's command with a log of its own, on cores of its own, and leaves its exit code for launch.sh.
# Called by launch.sh, through torchrun when there are several ranks. Usage: run_rank.sh COMMAND ARGS...
set -uo pipefail

local_rank=${LOCAL_RANK:-0}
local_size=${LOCAL_WORLD_SIZE:-1}
log_id=$((${ASCEND_DEVICE_ID:-0} + local_rank))
((${GROUP_WORLD_SIZE:-1} == 1)) || log_id=$RANK # several nodes may write to one shared folder
log=$LAUNCH_LOG_DIR/train_$log_id.log
echo "==== $(date '+%F %T') rank ${RANK:-0} of ${WORLD_SIZE:-1}: $*" >>"$log"

if ((local_rank == 0)); then
  # The first rank is also shown. A progress bar redraws its line with \r: the log keeps only what is left at its end.
  exec > >(tee >(sed -u 's/.*\r//' >>"$log")) 2>&1
  shown=$!
else
  exec >>"$log" 2>&1
  shown=""
fi

# Each rank gets an equal share of the cores this job may use, when there are enough of them.
bind=()
if [[ ${LAUNCH_CPU_BIND:-auto} == auto ]] && ((local_size > 1)) && command -v taskset >/dev/null; then
  read -r -a cores <<<"$(python3 -c 'import os; print(*sorted(os.sched_getaffinity(0)))')"
  share=$((${#cores[@]} / local_size))
  if ((share > 0)); then
    mine=("${cores[@]:local_rank * share:share}")
    bind=(taskset -c "$(IFS=,; echo "${mine[*]}")")
  fi
fi

"${bind[@]}" "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null' TERM INT
wait "$child"
code=$?
while kill -0 "$child" 2>/dev/null; do # a trapped signal ends the wait before the child has ended
  wait "$child"
  code=$?
done

echo "$code $log_id" >"$LAUNCH_STATUS_DIR/${RANK:-0}"
if [[ -n $shown ]]; then
  exec >&- 2>&-
  wait "$shown"
fi
exit "$code"
