#!/usr/bin/env bash
# Sourced by the train_*.sh of this folder before common/launch.sh: flags and defaults they share, and the command itself.
Network=CLIP_for_PyTorch
ExtraFlags="model_path train_epochs workers resume"
data_path="" model_path="" batch_size=64 epochs="" train_epochs="" precision=fp16 workers=8 resume=""

# Usage: train_clip OPTION... ; the recipe of the published table plus what the script adds.
train_clip() {
  require data_path model_path
  [[ -z $epochs || -z $train_epochs ]] || die "--epochs=$epochs and --train_epochs=$train_epochs: give one of them"
  [[ $resume == @(|auto) || -z $ckpt_path ]] || die "--resume=$resume and --ckpt_path=$ckpt_path: give one of them"
  local start=(--overwrite_output_dir)
  # the checkpoint that is named; --resume=auto beside it prefers the newest one of the output folder, as a restart does
  [[ -z $resume$ckpt_path ]] || start=(--resume "${ckpt_path:-$resume}")
  on_restart=(--resume auto)
  launch run_clip.py --model_name_or_path "$model_path" --data_dir "$data_path" \
    --dataset_name ydshieh/coco_dataset_script --dataset_config_name 2017 --do_train --do_eval \
    --num_train_epochs "${train_epochs:-${epochs:-3}}" --per_device_train_batch_size "$batch_size" \
    --per_device_eval_batch_size "$batch_size" --dataloader_num_workers "$workers" --dataloader_drop_last \
    --learning_rate 5e-5 --warmup_steps 0 --weight_decay 0.1 --ddp_bucket_cap_mb 150 "${start[@]}" "$@"
}
