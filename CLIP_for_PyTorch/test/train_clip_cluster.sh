#!/usr/bin/env bash
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_full_8p.sh" "$@" # with --nnodes --node_rank --master_addr --master_port
