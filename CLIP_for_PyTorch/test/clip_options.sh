#!/usr/bin/env bash
# Sourced by the train_*.sh of this folder before common/launch.sh: flags and defaults they share, and the command itself.
Network=CLIP_for_PyTorch
# Data: --data_path alone is COCO 2017; else --train_file (with --data_path where its pictures lie) or --train_shards,
# and to evaluate --validation_file, --validation_shards or --validation_share. As run_clip.py's options of these names.
data_flags="train_file train_shards validation_file validation_shards validation_share image_column caption_column
  delimiter caption_key max_bad_share source_weights cache_dir"
ExtraFlags="model_path train_epochs workers resume $data_flags"
data_path="" model_path="" batch_size=64 epochs="" train_epochs="" precision=fp16 workers=8 resume=""

# Usage: find_data ; the array data_options from the flags of the data, and evaluates=--do_eval where there is what to evaluate on.
find_data() {
  local name
  data_options=()
  [[ -z $data_path ]] || data_options+=(--data_dir "$data_path")
  for name in $data_flags; do [[ -z ${!name} ]] || data_options+=("--$name" "${!name}"); done
  evaluates=$validation_file$validation_shards$validation_share
  if [[ -z $train_file$train_shards$evaluates ]]; then
    require data_path
    data_options+=(--dataset_name ydshieh/coco_dataset_script --dataset_config_name 2017)
    evaluates=coco
  fi
}

# Usage: train_clip OPTION... ; the recipe of the published table plus what the script adds.
train_clip() {
  require model_path
  find_data
  [[ -n $train_file$train_shards || $evaluates == coco ]] || die "--train_file or --train_shards is required: what to train on"
  [[ -z $epochs || -z $train_epochs ]] || die "--epochs=$epochs and --train_epochs=$train_epochs: give one of them"
  [[ $resume == @(|auto) || -z $ckpt_path ]] || die "--resume=$resume and --ckpt_path=$ckpt_path: give one of them"
  local start=(--overwrite_output_dir)
  # the checkpoint that is named; --resume=auto beside it prefers the newest one of the output folder, as a restart does
  [[ -z $resume$ckpt_path ]] || start=(--resume "${ckpt_path:-$resume}")
  on_restart=(--resume auto)
  if [[ -n $evaluates ]]; then
    data_options+=(--do_eval)
    [[ $CaseKind == perf ]] || data_options+=(--eval_strategy epoch)
  fi
  launch run_clip.py --model_name_or_path "$model_path" "${data_options[@]}" --do_train \
    --num_train_epochs "${train_epochs:-${epochs:-3}}" --per_device_train_batch_size "$batch_size" \
    --per_device_eval_batch_size "$batch_size" --dataloader_num_workers "$workers" --dataloader_drop_last \
    --learning_rate 5e-5 --warmup_steps 0 --weight_decay 0.1 --ddp_bucket_cap_mb 150 "${start[@]}" "$@"
}
