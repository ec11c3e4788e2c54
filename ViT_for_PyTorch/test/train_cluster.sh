#!/usr/bin/env bash
# Fine-tunes ViT-B/16 on several servers: run it on each of them, or once with common/launch_cluster.py --run.
# Usage: bash test/train_cluster.sh --data_path=DIR --ckpt_path=FILE and one of
#   --rank_table_file=FILE   the server finds itself in the table by its addresses, or --node_rank=K
#   --hostfile=FILE          a line 'address [slots=N]' a server; likewise
#   --nnodes=N --node_rank=K --master_addr=HOST [--nproc=8]
# The other flags are those of train_full_8p.sh. --dry_run shows the command of every server.
if [[ " $* " == *" --help "* ]]; then
  sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
elif [[ ! " $*" =~ \ --(rank_table_file|hostfile|nnodes)[=\ ] ]]; then
  echo "error: give --rank_table_file, --hostfile or --nnodes with --node_rank and --master_addr (--help says more)" >&2
  exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_full_8p.sh" "$@"
