#!/usr/bin/env bash
# Starts this server's ranks of a run that a rank table describes; the arguments are those of the reference's script.
# Usage: bash run_distribute.sh RANK_TABLE CONFIG [a,b] MODE [RANK_SIZE] [PREDICT_DATA] [--device=... -- KEY=VALUE ...]
#   [a,b]  b is left out. Without RANK_SIZE: the devices of the only server. With it: this server's ranks of RANK_SIZE.
#   MODE   train, finetune, eval or predict, which rank 0 does alone.
#   It waits for the training and ends with its exit code; logs are in test/output/, as of the scripts in test/.
Network=ViT_for_PyTorch; CaseKind=acc; RankSize=1
UnusedFlags="data_path" # the configuration names the data
positional=()
while (($#)) && [[ $1 != --* ]]; do
  positional+=("$1")
  shift
done
if [[ ${1:-} != --help ]]; then
  project=$(realpath "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/..")
  share=$(PYTHONPATH=$project python3 -m vit.rank_range "${positional[@]}" "$@") || exit 2
  eval "$share"
  [[ $run_mode != eval ]] || Network=ViT_for_PyTorch_eval
  if [[ -n $starts_nothing ]]; then
    echo "$starts_nothing"
    exit 0
  fi
fi
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
[[ ${run_mode:-} == eval || ${run_mode:-} == predict ]] || on_restart=(--resume_training auto)
launch run_vit.py --config "$config" --run_mode "$run_mode" ${ckpt_path:+--load_checkpoint "$ckpt_path"} \
  ${predict_data:+--predict_data "$predict_data"} ${batch_size:+--batch_size "$batch_size"} ${epochs:+--epochs "$epochs"}
