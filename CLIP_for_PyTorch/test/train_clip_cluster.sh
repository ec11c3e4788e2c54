#!/usr/bin/env bash
exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_cluster.sh" "$@" # the name in the reference's style
