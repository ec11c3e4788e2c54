#!/usr/bin/env bash
# Sourced by every project's test/train_cluster.sh: train_full_8p.sh of the same folder, with a cluster named.
# It takes one of
#   --rank_table_file=FILE   each server finds itself in the table by its addresses, or --node_rank=K says it
#   --hostfile=FILE          a line 'address [slots=N]' a server; likewise
#   --nnodes=N --node_rank=K --master_addr=HOST [--nproc=8]
# and the flags of train_full_8p.sh. --dry_run shows the command of every server.
if [[ " $* " == *" --help "* ]]; then
  sed -n '3,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
elif [[ ! " $*" =~ \ --(rank_table_file|hostfile|nnodes)[=\ ] ]]; then
  echo "error: give --rank_table_file, --hostfile or --nnodes with --node_rank and --master_addr (--help says more)" >&2
  exit 2
fi
exec bash "$(dirname "$(realpath "${BASH_SOURCE[1]}")")/train_full_8p.sh" "$@"
