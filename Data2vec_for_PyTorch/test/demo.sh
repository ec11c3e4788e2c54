#!/usr/bin/env bash
# Encodes Shakespeare's text, pretrains a small data2vec on it, and shows that its representations got better.
# Usage: bash test/demo.sh SAMPLE_DATA_DIR [OUTPUT_DIR [SEED]] ; called by `make demo` and `make outcomes`.
# OUTPUT_DIR/demo.json holds the numbers that it ends with, in percent.
set -euo pipefail
project=$(cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." && pwd)
text=$(realpath "$1")/text
output=$(realpath -m "${2:-$project/test/output/demo}")
seed=${3:-1}
cd "$project"
corpus=$(mktemp -d)
trap 'rm -rf "$corpus"' EXIT

python3 bpe_encode.py --learn 500 --encoder-json "$corpus/encoder.json" --vocab-bpe "$corpus/vocab.bpe" --keep-empty \
  --inputs "$text/train.txt" "$text/valid.txt" --outputs "$corpus/train.bpe" "$corpus/valid.bpe" --workers 2
python3 preprocess.py --only-source --trainpref "$corpus/train.bpe" --validpref "$corpus/valid.bpe" \
  --destdir "$corpus/data-bin" --workers 2

bash test/train_full_1p.sh --data_path="$corpus/data-bin" --config_name=demo \
  --output_dir="$output" -- --resume none "common.seed=$seed" # an earlier demo is kept aside

echo
python3 probe.py --config-name demo "common.seed=$seed" "task.data=$corpus/data-bin" "common_eval.path=$output/checkpoints/checkpoint_last.pt" |
  tee "$output/probe.txt"
python3 - "$output" <<'PYTHON'
import json, sys
from pathlib import Path

output = Path(sys.argv[1])
lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
train = [line for line in lines if line["kind"] == "train"]
first, last = train[0], train[-1]
print(f"update {first['step']:4}: loss {first['loss']:.3f}, std of targets {first['target_std']:.2f}, of predictions {first['pred_std']:.2f}")
print(f"update {last['step']:4}: loss {last['loss']:.3f}, std of targets {last['target_std']:.2f}, of predictions {last['pred_std']:.2f}")
table = {line[:22].strip(): [float(x) for x in line[22:].split()] for line in (output / "probe.txt").read_text().splitlines()[1:]}
before, after = table["linear probe"]
print(f"linear probe on held-out text: {before:.1f} % untrained, {after:.1f} % trained, {table['commonest token'][1]:.1f} % by always guessing the commonest token")
print(f"cloze retrieval on held-out text: {table['cloze retrieval'][0]:.1f} % untrained, {table['cloze retrieval'][1]:.1f} % trained, {table['chance'][1]:.1f} % by chance")
(output / "demo.json").write_text(json.dumps({"probe": after, "untrained_probe": before, "probe_gain": after - before}))
sys.exit(0 if after > before + 2.5 else "error: the trained model's probe should be clearly better than the untrained one's")
PYTHON
echo "loss plot: $output/loss.png"
