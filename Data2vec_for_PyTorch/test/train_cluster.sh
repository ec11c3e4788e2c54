#!/usr/bin/env bash
# Pretrains data2vec text on several servers: run it on each of them, or once with common/launch/cluster.py --run.
# Usage: bash test/train_cluster.sh --rank_table_file=FILE --data_path=DIR, and the flags of train_full_8p.sh
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch/train_cluster.sh"
