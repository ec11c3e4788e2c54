#!/usr/bin/env bash
# Trains CLIP on COCO 2017 on 8 devices of one host, or of each of several (--nnodes, --node_rank, --master_addr): DIR holds the zips or what they unpack to.
# An interrupted run goes on with --resume=auto. FOLDER is made by save_clip_roberta.py.
# Usage: bash test/train_full_8p.sh --data_path=DIR --model_path=FOLDER [--batch_size=64 --epochs=3 --resume=auto]
CaseKind=acc; RankSize=8
source "$(dirname "${BASH_SOURCE[0]}")/clip_options.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch.sh" "$@"
train_clip --save_every 2000 --save_total_limit 2 --eval_strategy epoch
