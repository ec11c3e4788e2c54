#!/usr/bin/env bash
# Trains CLIP on COCO 2017 on several servers: run it on each of them, or once with common/launch/cluster.py --run.
# Usage: bash test/train_cluster.sh --rank_table_file=FILE --data_path=DIR --model_path=FOLDER [--batch_size=64 --epochs=3]
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch/train_cluster.sh"
