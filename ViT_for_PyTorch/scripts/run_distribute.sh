#!/usr/bin/env bash
# Starts this server's ranks of a run that a rank table describes; the arguments are those of the reference's script.
# Usage: bash run_distribute.sh RANK_TABLE CONFIG [a,b] MODE [RANK_SIZE] [PREDICT_DATA] [--device=... -- KEY=VALUE ...]
#   [a,b]  b is left out. Without RANK_SIZE: the devices of the only server. With it: this server's ranks of RANK_SIZE.
#   MODE   train, finetune, eval, knn, linear, or predict, which rank 0 does alone.
#   --data_path=DIR replaces the data folders of CONFIG by DIR/train and DIR/val; --resume=auto goes on in --output_dir,
#   which --max_restarts=N implies.
#   On one server it waits for the training and ends with its exit code. Of several servers each returns at once, as the
#   reference's does, so that a loop over ssh starts them all; --foreground waits. Logs are in test/output/.
Network=ViT_for_PyTorch; CaseKind=acc; RankSize=1
ExtraFlags="resume"
foreground="" words=()
for word in "$@"; do
  [[ $word != --foreground && $word != --dry_run ]] || foreground=yes
  [[ $word == --foreground ]] || words+=("$word")
done
set -- "${words[@]}"
positional=()
while (($#)) && [[ $1 != --* ]]; do
  positional+=("$1")
  shift
done
if [[ ${1:-} != --help ]]; then
  project=$(realpath "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/..")
  share=$(PYTHONPATH=$project python3 "$project/vit/rank_range.py" "${positional[@]}" "$@") || exit 2 # not -m: no torch
  eval "$share"
  [[ $run_mode != @(eval|knn|linear) ]] || Network=ViT_for_PyTorch_$run_mode
  if [[ -n $starts_nothing ]]; then
    echo "$starts_nothing"
    exit 0
  fi
  if ((servers > 1)) && [[ -z $foreground ]]; then
    log=$project/test/output/run_distribute_server$node_rank.log
    mkdir -p "${log%/*}"
    setsid nohup bash "${BASH_SOURCE[0]}" "${positional[@]}" "$@" --foreground </dev/null >"$log" 2>&1 &
    echo "process $! starts this server's ranks and meets the other servers; its log: $log; kill $! ends it"
    exit 0
  fi
fi
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
if [[ ${run_mode:-} == @(train|finetune) ]]; then
  on_restart=(--resume_training auto)
  ((${max_restarts:-0} == 0)) || resume=${resume:-auto}
fi
launch run_vit.py --config "$config" --run_mode "$run_mode" ${ckpt_path:+--load_checkpoint "$ckpt_path"} \
  ${data_path:+--train_dataset_dir "$data_path/train" --eval_dataset_dir "$data_path/val"} \
  ${resume:+--resume_training "$resume"} \
  ${predict_data:+--predict_data "$predict_data"} ${batch_size:+--batch_size "$batch_size"} ${epochs:+--epochs "$epochs"}
