#!/usr/bin/env bash
# From pictures to a pretrained encoder, and what it is worth: teacher, tokenizer, BEiT v2 pretraining, then fine-tuning
# from it and from scratch, three seeds each, at the same budget.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo PROJECT=Beit2_for_PyTorch` and
# `make outcomes`. OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
pictures=$(realpath "$1")/images
output=$(realpath -m "${2:-$project/test/output/demo}")
first_seed=${3:-0}
cd "$project"
export OMP_NUM_THREADS=1 # a thread a run, and two runs side by side
common=(--input_size 64 --num_workers 0 --log_every 23 --no_auto_resume --precision fp32)
classify=(run_class_finetuning.py "${common[@]}" --model beit_tiny_patch16_224 --batch_size 64
  --data_path "$pictures/train" --eval_data_path "$pictures/val" --aa none --reprob 0 --color_jitter 0
  --layer_decay 1.0 --drop_path 0 --init_scale 1 --lr 1e-3 --warmup_epochs 1 --disable_eval_during_finetuning)

# Usage: finetune pretrained|scratch NUMBER
finetune() {
  local weights=()
  [[ $1 == scratch ]] || weights=(--finetune "$output/pretraining/checkpoint.pth")
  mkdir -p "$output/$1-$2"
  python3 "${classify[@]}" --epochs 2 --seed $((first_seed + $2)) "${weights[@]}" --output_dir "$output/$1-$2" \
    >"$output/$1-$2/train.log" 2>&1 || { cat "$output/$1-$2/train.log" >&2; return 1; }
}

# fine-tuning from scratch, three seeds: it waits for nothing, so it runs beside the steps below
(for number in 0 1 2; do finetune scratch $number || exit 1; done) &
scratch=$!
trap 'kill $scratch 2>/dev/null || true' EXIT

echo "1. teacher: a tiny ViT classifier, from scratch"
python3 "${classify[@]}" --seed "$first_seed" --epochs 3 --use_cls --abs_pos_emb --disable_rel_pos_bias --layer_scale_init_value 0 \
  --output_dir "$output/teacher"

echo "2. tokenizer: 256 visual tokens that let a decoder rebuild the teacher's features"
python3 run_vqkd_training.py "${common[@]}" --seed "$first_seed" --model vqkd_encoder_tiny_decoder_1x192x3_dino --batch_size 64 --epochs 2 \
  --teacher_weight "$output/teacher/checkpoint.pth" --data_path "$pictures/train" --eval_data_path "$pictures/val" \
  --codebook_n_emd 256 --codebook_emd_dim 16 --quantize_kmeans_init --ema_decay 0.9 --lr 2e-3 --warmup_epochs 1 \
  --opt_betas 0.9 0.99 --output_dir "$output/tokenizer"

echo "3. pretraining: predict the tokens of masked patches"
python3 run_beitv2_pretraining.py "${common[@]}" --seed "$first_seed" --model beit_tiny_patch16_224_8k_vocab_cls_pt --batch_size 32 \
  --epochs 6 --tokenizer_model vqkd_encoder_tiny_decoder_1x192x3_dino --codebook_size 256 --codebook_dim 16 \
  --tokenizer_weight "$output/tokenizer/checkpoint.pth" --second_input_size 64 --second_interpolation bicubic \
  --num_mask_patches 6 --min_mask_patches_per_block 2 --min_crop_scale 0.4 --drop_path 0 --lr 1.5e-3 \
  --warmup_epochs 1 --clip_grad 3.0 --data_path "$pictures/train" --output_dir "$output/pretraining"
python3 draw_predictions.py --checkpoint "$output/pretraining/checkpoint.pth" \
  --tokenizer_weight "$output/tokenizer/checkpoint.pth" --data_path "$pictures/val" --output "$output/predictions.png"

echo "4. fine-tuning from it, three seeds, two epochs each, as from scratch"
finetune pretrained 0 &
first=$!
finetune pretrained 1
wait $first
finetune pretrained 2
wait $scratch

python3 - "$output" <<'PYTHON'
import json
import re
import sys
from pathlib import Path

means = {}
for start in ("pretrained", "scratch"):
    files = [Path(sys.argv[1], f"{start}-{seed}", "Beit2_for_PyTorch_bs64_1p_acc.log") for seed in range(3)]
    values = [float(re.search(r"^TrainAccuracy = (.*)$", file.read_text(), re.M).group(1)) for file in files]
    means[start] = sum(values) / 3
    print(f"{start:>10}: {means[start]:.1f} % of held-out pictures right, mean of {values}")
print("loss plot: pretraining/loss.png, pictures: predictions.png, both in", sys.argv[1])
numbers = means | {"finetune_gain": means["pretrained"] - means["scratch"]}
Path(sys.argv[1], "demo.json").write_text(json.dumps(numbers))
sys.exit(0 if means["pretrained"] > means["scratch"] else "error: pretraining did not help")
PYTHON
