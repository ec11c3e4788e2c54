#!/usr/bin/env bash
# Ascend environment for one run: finds CANN and sets documented variables that the user has not set.
# Sourced by launch.sh when the device is npu, unless etp_running_flag=true says that the platform has done it.

find_cann() {
  local info=${CANN_INSTALL_INFO:-/etc/Ascend/ascend_cann_install.info} root folder
  if [[ -f $info ]]; then
    root=$(grep -m 1 'Install_Path' "$info" | cut -d = -f 2 | tr -d '[:space:]')
  fi
  for root in ${root:-} "${ASCEND_HOME_PATH:+$(dirname "$(dirname "$ASCEND_HOME_PATH")")}" /usr/local/Ascend "$HOME/Ascend"; do
    for folder in ascend-toolkit nnae cann; do
      if [[ -n $root && -f $root/$folder/set_env.sh ]]; then
        echo "$root/$folder/set_env.sh"
        return 0
      fi
    done
  done
  return 1
}

if cann_script=$(find_cann); then
  echo "CANN environment: $cann_script"
  set +u # CANN's script reads variables that may not be set
  source "$cann_script"
  set -u
else
  echo "warning: no CANN set_env.sh found (looked at /etc/Ascend/ascend_cann_install.info, /usr/local/Ascend, ~/Ascend);" \
    "going on with the environment as it is" >&2
fi

# NPU_PRESET=speed (default) | debug | deterministic. A variable that the user has set stays as it is.
preset() { # NAME=VALUE
  [[ -v ${1%%=*} ]] || export "${1?}"
}

: "${NPU_PRESET:=speed}"
# Only errors in CANN's own logs; this process only. (The device-wide msnpureport setting is every user's: left alone.)
preset ASCEND_GLOBAL_LOG_LEVEL=3
preset ASCEND_GLOBAL_EVENT_ENABLE=0
preset ASCEND_SLOG_PRINT_TO_STDOUT=0
# Grow the allocator's segments instead of keeping blocks that no later batch fits into.
preset PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
# Cards may take minutes to meet (first compilation); a collective that takes nine minutes has lost a peer. Both stay
# below the process group's own time-out (common/distributed.py), else it would not be HCCL that says who is missing.
preset HCCL_CONNECT_TIMEOUT=1200
preset HCCL_EXEC_TIMEOUT=540
# A failed collective ends its process instead of leaving it to wait (today's name of HCCL_ASYNC_ERROR_HANDLING).
preset TORCH_HCCL_ASYNC_ERROR_HANDLING=1
case $NPU_PRESET in
  speed)
    # Launches operators from two threads ahead of the device; the second level may raise peak memory.
    preset TASK_QUEUE_ENABLE=2
    # Main and launch thread on cores of their own, loader workers on the card's other cores.
    preset CPU_AFFINITY_CONF=2
    # Small collectives on the vector cores instead of the card's processor.
    preset HCCL_OP_EXPANSION_MODE=AIV
    ;;
  debug)
    # One operator after the other, so that an error names the line of Python that called it. Slow.
    preset ASCEND_LAUNCH_BLOCKING=1
    preset TASK_QUEUE_ENABLE=0
    # Which rank entered which collective, and what filled the memory.
    preset TORCH_HCCL_DESYNC_DEBUG=1
    preset OOM_SNAPSHOT_ENABLE=1
    preset ASCEND_GLOBAL_EVENT_ENABLE=1
    ;;
  deterministic)
    # Sums over ranks in one order; common.device.deterministic sets the operators. Slower.
    preset HCCL_DETERMINISTIC=true
    preset TASK_QUEUE_ENABLE=1
    ;;
  *)
    echo "error: NPU_PRESET=$NPU_PRESET: choose speed, debug or deterministic" >&2
    exit 2
    ;;
esac
echo "NPU_PRESET=$NPU_PRESET TASK_QUEUE_ENABLE=$TASK_QUEUE_ENABLE HCCL_CONNECT_TIMEOUT=$HCCL_CONNECT_TIMEOUT" \
  "HCCL_EXEC_TIMEOUT=$HCCL_EXEC_TIMEOUT"
