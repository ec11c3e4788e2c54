#!/usr/bin/env bash
# Measures the speed of BEiT v2 pretraining on one device; saves nothing.
# Usage: bash test/train_performance_1p.sh --data_path=DIR [--max_steps=N --batch_size=N ...]
Network=Beit2_for_PyTorch; CaseKind=perf
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
ExtraFlags="tokenizer_weight tokenizer_model model log_dir"
data_path=""; batch_size=128; epochs=1600; max_steps=100
tokenizer_model=vqkd_encoder_base_decoder_3x768x12_clip; model=beit_base_patch16_224_8k_vocab_cls_pt
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
require data_path
tokenizer=(--random_tokenizer) # the speed does not depend on the weights
[[ -z $tokenizer_weight ]] || tokenizer=(--tokenizer_weight "$tokenizer_weight")
launch run_beitv2_pretraining.py --data_path "$data_path" --batch_size "$batch_size" --epochs "$epochs" \
  --model "$model" --tokenizer_model "$tokenizer_model" "${tokenizer[@]}" \
  ${ckpt_path:+--resume "$ckpt_path"} ${log_dir:+--log_dir "$log_dir"} \
  --second_interpolation bicubic --min_crop_scale 0.2 --lr 1.5e-3 --warmup_epochs 10 --clip_grad 3.0 \
  --imagenet_default_mean_and_std --opt_betas 0.9 0.999 --no_auto_resume
