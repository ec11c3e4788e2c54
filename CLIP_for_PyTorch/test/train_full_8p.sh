#!/usr/bin/env bash
# Trains CLIP on COCO 2017 on 8 devices of one host, or of each of several (--nnodes, --node_rank, --master_addr): DIR holds the zips or what they unpack to.
# An interrupted run goes on with --resume=auto. FOLDER is made by save_clip_roberta.py.
# Usage: bash test/train_full_8p.sh --data_path=DIR --model_path=FOLDER [--batch_size=64 --epochs=3 --resume=auto]
#    or: bash test/train_full_8p.sh --train_shards='TARS/{000..199}.tar' --validation_share=0.01 --model_path=FOLDER
RankSize=8
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_full_1p.sh" "$@"
