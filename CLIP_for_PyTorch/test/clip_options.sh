#!/usr/bin/env bash
# Sourced by the train_*.sh of this folder before common/launch.sh: flags and defaults they share, and the command itself.
Network=CLIP_for_PyTorch
ExtraFlags="model_path train_epochs workers resume"
data_path="" model_path="" batch_size=64 epochs=3 train_epochs="" precision=fp16 workers=8 resume=""

# Usage: train_clip OPTION... ; the recipe of the published table plus what the script adds.
train_clip() {
  require data_path model_path
  local start=(--overwrite_output_dir)
  [[ -z $resume$ckpt_path ]] || start=(--resume "${resume:-$ckpt_path}")
  launch run_clip.py --model_name_or_path "$model_path" --data_dir "$data_path" \
    --dataset_name ydshieh/coco_dataset_script --dataset_config_name 2017 --do_train --do_eval \
    --num_train_epochs "${train_epochs:-$epochs}" --per_device_train_batch_size "$batch_size" \
    --per_device_eval_batch_size "$batch_size" --dataloader_num_workers "$workers" --dataloader_drop_last \
    --learning_rate 5e-5 --warmup_steps 0 --weight_decay 0.1 --ddp_bucket_cap_mb 150 "${start[@]}" "$@"
}
