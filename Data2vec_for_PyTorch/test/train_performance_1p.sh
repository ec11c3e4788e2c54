#!/usr/bin/env bash
# Speed of data2vec text pretraining on 1 device: no validation, no checkpoints.
# Usage: bash test/train_performance_1p.sh --data_path=DIR [--config_name=base_64 --max_update=5000]; DIR holds dict.txt, train.bin, ...
Network=Data2vec_for_PyTorch; CaseKind=perf
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
ExtraFlags="config_dir config_name max_update"
config_dir=configs/text/pretraining; config_name=${config_name:-base_64}; max_update=5000
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
launch train.py -m --config-dir "$config_dir" --config-name "$config_name" "task.data=$data_path" \
  "distributed_training.distributed_world_size=$world_size" "optimization.max_update=$max_update" \
  common.threshold_loss_scale=0.001 ${batch_size:+"dataset.batch_size=$batch_size"} \
  ${epochs:+"optimization.max_epoch=$epochs"} \
  --resume "${ckpt_path:-none}" dataset.disable_validation=true checkpoint.no_save=true
