#!/usr/bin/env bash
# Pretrains a small data2vec on Shakespeare's letters and another on emoji, side by side, and holds what their representations
# know beside guessing, counting or raw pixels, and the untrained models.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo` and `make outcomes`.
# OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
(($#)) || { echo "error: which sample data? bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]]" >&2; exit 2; }
source "$project/../common/whole_group.sh"
text=$(realpath "$1")/text
pictures=$(realpath "$1")/images
output=$(realpath -m "${2:-$project/test/output/demo}")
seed=${3:-1}
cd "$project"
export OMP_NUM_THREADS=1 # two runs side by side
corpus=$(mktemp -d)
trap 'rm -rf "$corpus"' EXIT
mkdir -p "$output"

pretrain_pictures() {
  local vision=(--config_dir=configs/vision/pretraining --config_name=demo)
  bash test/train_full_1p.sh --data_path="$pictures" "${vision[@]}" --output_dir="$output/pictures" -- \
    --resume none "common.seed=$seed" || return 1
  python3 probe.py --config-dir configs/vision/pretraining --config-name demo "common.seed=$seed" "task.data=$pictures" \
    "common_eval.path=$output/pictures/checkpoints/checkpoint_last.pt" >"$output/pictures/probe.txt" || return 1
  python3 draw_cloze.py --config-dir configs/vision/pretraining --config-name demo "common.seed=$seed" \
    "task.data=$pictures" "common_eval.path=$output/pictures/checkpoints/checkpoint_last.pt" \
    --output_dir "$output/pictures"
}

(pretrain_pictures >"$output/pictures.log" 2>&1 || { cat "$output/pictures.log" >&2; exit 1; }) &
picture_run=$!

# A vocabulary of single bytes: which letter is hidden is learned in minutes. The plays of test.txt are asked at the end alone.
python3 bpe_encode.py --learn 256 --encoder-json "$corpus/encoder.json" --vocab-bpe "$corpus/vocab.bpe" --keep-empty \
  --inputs "$text/train.txt" "$text/valid.txt" "$text/test.txt" \
  --outputs "$corpus/train.bpe" "$corpus/valid.bpe" "$corpus/test.bpe" --workers 1
python3 preprocess.py --only-source --trainpref "$corpus/train.bpe" --validpref "$corpus/valid.bpe" \
  --testpref "$corpus/test.bpe" --destdir "$corpus/data-bin" --workers 1
bash test/train_full_1p.sh --data_path="$corpus/data-bin" --config_name=demo \
  --output_dir="$output/text" -- --resume none "common.seed=$seed" # an earlier demo is kept aside
asked=(--config-name demo "common.seed=$seed" "task.data=$corpus/data-bin" dataset.valid_subset=test)
asked+=("common_eval.path=$output/text/checkpoints/checkpoint_last.pt")
wait $picture_run # earlier than the text
python3 draw_cloze.py "${asked[@]}" --output_dir "$output/text" --encoder-json "$corpus/encoder.json" >"$output/text/draw.log" 2>&1 &
drawing=$!
python3 probe.py "${asked[@]}" | tee "$output/text/probe.txt"
wait $drawing || { cat "$output/text/draw.log" >&2; exit 1; }
cat "$output/pictures/probe.txt"

times >"$output/times.txt"
echo
PYTHONPATH="$project/..${PYTHONPATH:+:$PYTHONPATH}" python3 test/demo_report.py "$output"
