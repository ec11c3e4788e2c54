#!/usr/bin/env bash
# Evaluates a trained folder on COCO 2017's validation split on one device: in-batch loss and retrieval.
# Usage: bash test/train_eval_1p.sh --data_path=DIR --ckpt_path=FOLDER [--batch_size=64]
CaseKind=acc; RankSize=1
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/clip_options.sh"
UnusedFlags="epochs train_epochs resume"
Network=CLIP_for_PyTorch_eval # its result stands beside the training's
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
model_path=${ckpt_path:-$model_path}
require data_path model_path
launch run_clip.py --model_name_or_path "$model_path" --data_dir "$data_path" --dataset_name ydshieh/coco_dataset_script \
  --dataset_config_name 2017 --do_eval --per_device_eval_batch_size "$batch_size" --dataloader_num_workers "$workers" \
  --dataloader_drop_last
