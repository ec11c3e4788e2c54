#!/usr/bin/env bash
# Trains CLIP on one device: on COCO 2017, of which DIR holds the zips or what they unpack to, or on pairs of your own.
# An interrupted run goes on with --resume=auto. FOLDER is made by save_clip_roberta.py.
# Usage: bash test/train_full_1p.sh --data_path=DIR --model_path=FOLDER [--batch_size=64 --epochs=3 --resume=auto]
#    or: bash test/train_full_1p.sh --train_file=pairs.csv --validation_share=0.1 --model_path=FOLDER
CaseKind=acc
[[ $0 != "${BASH_SOURCE[0]}" ]] || RankSize=1 # else the script for 8 devices runs this one
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/clip_options.sh"
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch.sh" "$@"
train_clip --save_every 2000 --save_total_limit 2
