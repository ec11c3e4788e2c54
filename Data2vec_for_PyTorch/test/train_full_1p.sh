#!/usr/bin/env bash
# Pretrains data2vec text on 1 device, in the ModelZoo's one-card setting (64 tokens a sample). Goes on where it stopped.
# Usage: bash test/train_full_1p.sh --data_path=DIR [--config_name=base_64 --max_update=1000000 --ckpt_path=FILE]; DIR holds dict.txt, train.bin, ...
# Pictures: --config_dir=configs/vision/pretraining --config_name=base_imagenet; DIR holds them, or train/ with them.
Network=Data2vec_for_PyTorch; CaseKind=acc
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
ExtraFlags="config_dir config_name max_update"
config_dir=configs/text/pretraining; config_name=${config_name:-base_64}; max_update=
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
on_restart=(--resume auto)
launch train.py -m --config-dir "$config_dir" --config-name "$config_name" "task.data=$data_path" \
  "distributed_training.distributed_world_size=$world_size" ${max_update:+"optimization.max_update=$max_update"} \
  common.threshold_loss_scale=0.001 ${batch_size:+"dataset.batch_size=$batch_size"} \
  ${epochs:+"optimization.max_epoch=$epochs"} ${ckpt_path:+--resume "$ckpt_path"}
