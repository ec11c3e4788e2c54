#!/usr/bin/env bash
# From pictures without labels to a pretrained encoder, and what it is worth where labels are few: tokenizer, BEiT v2
# pretraining, then fine-tuning on a tenth of the labels, three such tenths, from it and from scratch. Nothing before the
# fine-tuning sees a label: the tokenizer's teacher is the pixels (test/pixel_teacher.py). From scratch trains as many CPU
# seconds as tokenizer, pretraining and fine-tuning take together.
# Promises: pretrained >= 44 within 480 CPU seconds
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo PROJECT=Beit2_for_PyTorch` and
# `make outcomes`. OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent. RANDOM_TOKENIZER=1 pretrains on the
# tokens of an untrained tokenizer, for comparison.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
(($#)) || { echo "error: which sample data? bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]]" >&2; exit 2; }
source "$project/../common/whole_group.sh"
pictures=$(realpath "$1")/images
output=$(realpath -m "${2:-$project/test/output/demo}")
first_seed=${3:-0}
cd "$project"
mkdir -p "$output"
export OMP_NUM_THREADS=1 # a thread a run, and two runs side by side
common=(--input_size 48 --num_workers 0 --log_every 46 --no_auto_resume --precision fp32)
tokenizer=vqkd_encoder_nano_decoder_1x96x4_dino
tokens=(--tokenizer_weight "$output/tokenizer/checkpoint.pth")
[[ -z ${RANDOM_TOKENIZER:-} ]] || tokens=(--random_tokenizer)

# A tenth of every class's pictures: of the sorted list each tenth one, from the first, fourth or seventh on.
for number in 0 1 2; do
  rm -rf "$output/labels-$number"
  for class in "$pictures"/train/*/; do
    mkdir -p "$output/labels-$number/$(basename "$class")"
    find "$class" -name '*.png' | LC_ALL=C sort | awk -v first=$((3 * number + 1)) 'NR % 10 == first' |
      xargs ln -s -t "$output/labels-$number/$(basename "$class")"
  done
done

# Usage: finetune pretrained|scratch NUMBER EPOCHS
finetune() {
  local weights=()
  [[ $1 == scratch ]] || weights=(--finetune "$output/pretraining/checkpoint.pth")
  mkdir -p "$output/$1-$2"
  python3 run_class_finetuning.py "${common[@]}" --model beit_nano_patch8_48 --batch_size 25 --epochs "$3" \
    --data_path "$output/labels-$2" --eval_data_path "$pictures/val" --aa none --reprob 0 --color_jitter 0 \
    --layer_decay 1.0 --drop_path 0 --init_scale 1 --lr 1e-3 --warmup_epochs 2 --disable_eval_during_finetuning \
    --no_save_ckpt --seed $((first_seed + $2)) "${weights[@]}" --output_dir "$output/$1-$2" \
    >"$output/$1-$2/train.log" 2>&1 || { cat "$output/$1-$2/train.log" >&2; return 1; }
}

# fine-tuning from scratch waits for nothing, so it runs beside the steps below; its CPU seconds are theirs
(for number in 0 1 2; do finetune scratch $number 140 || exit 1; done) &
scratch=$!

echo "1. tokenizer: 128 visual tokens that let a decoder rebuild every patch"
python3 test/pixel_teacher.py "$output/teacher.pth"
python3 run_vqkd_training.py "${common[@]}" --seed "$first_seed" --model $tokenizer --batch_size 32 --epochs 5 --disable_eval \
  --teacher_weight "$output/teacher.pth" --data_path "$pictures/train" --codebook_n_emd 128 --codebook_emd_dim 16 \
  --quantize_kmeans_init --ema_decay 0.9 --lr 2e-3 --warmup_epochs 1 --opt_betas 0.9 0.99 --min_crop_scale 0.4 \
  --output_dir "$output/tokenizer"

echo "2. pretraining: predict the tokens of masked patches"
python3 run_beitv2_pretraining.py "${common[@]}" --seed "$first_seed" --model beit_nano_patch8_48_8k_vocab_cls_pt \
  --batch_size 32 --epochs 16 --early_layers 3 --head_layers 1 --tokenizer_model $tokenizer --codebook_size 128 \
  --codebook_dim 16 "${tokens[@]}" --second_input_size 48 --second_interpolation bicubic --num_mask_patches 16 \
  --min_mask_patches_per_block 4 --min_crop_scale 0.4 --color_jitter 0 --drop_path 0 --lr 2e-3 --warmup_epochs 1 \
  --clip_grad 3.0 --data_path "$pictures/train" --output_dir "$output/pretraining"
python3 draw_predictions.py --checkpoint "$output/pretraining/checkpoint.pth" \
  --tokenizer_weight "$output/tokenizer/checkpoint.pth" --data_path "$pictures/val" --output "$output/predictions.png" | tee "$output/predictions.txt"

echo "3. fine-tuning on a tenth of the labels, three tenths"
for number in 0 1 2; do finetune pretrained $number 40; done
wait $scratch

times >"$output/times.txt"
echo
PYTHONPATH="$project/..${PYTHONPATH:+:$PYTHONPATH}" python3 test/demo_report.py "$pictures" "$output"
