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

# Only errors in CANN's own logs; this process only. (The device-wide msnpureport setting is every user's: left alone.)
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
export ASCEND_GLOBAL_EVENT_ENABLE=${ASCEND_GLOBAL_EVENT_ENABLE:-0}
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
# Queue operator launches from Python ahead of the device.
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}
# Cards may take minutes to meet (first compilation); a collective that takes 20 minutes has lost a peer.
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1800}
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-1200}
echo "HCCL_CONNECT_TIMEOUT=$HCCL_CONNECT_TIMEOUT HCCL_EXEC_TIMEOUT=$HCCL_EXEC_TIMEOUT TASK_QUEUE_ENABLE=$TASK_QUEUE_ENABLE"
