#!/usr/bin/env bash
# Pretraining loss of a checkpoint on a split (valid by default); data2vec's pretraining has no accuracy.
# Usage: bash test/train_eval_1p.sh --data_path=DIR --checkpoint_path=FILE [--config_name=base_64 --subset=valid]
Network=Data2vec_for_PyTorch_eval; CaseKind=acc; RankSize=1
ExtraFlags="checkpoint_path config_dir config_name subset"; UnusedFlags="epochs"
config_dir=configs/text/pretraining; config_name=base_64; subset=valid
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
[[ -z $checkpoint_path || -z $ckpt_path ]] || die "--checkpoint_path and --ckpt_path: give one of them"
checkpoint_path=${checkpoint_path:-$ckpt_path}
require data_path checkpoint_path
launch validate.py -m --config-dir "$config_dir" --config-name "$config_name" "task.data=$data_path" \
  "common_eval.path=$checkpoint_path" "dataset.valid_subset=$subset" \
  ${batch_size:+"dataset.batch_size=$batch_size"}
