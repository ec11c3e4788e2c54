#!/usr/bin/env bash
exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/train_performance_1p.sh" "$@" # the name in the reference's README
