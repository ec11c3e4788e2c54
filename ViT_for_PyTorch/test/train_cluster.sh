#!/usr/bin/env bash
# Fine-tunes ViT-B/16 on several servers: run it on each of them, or once with common/launch/cluster.py --run.
# Usage: bash test/train_cluster.sh --rank_table_file=FILE --data_path=DIR --ckpt_path=FILE [--batch_size=32 --epochs=100]
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch/train_cluster.sh"
