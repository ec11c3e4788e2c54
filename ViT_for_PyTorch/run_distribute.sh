#!/usr/bin/env bash
exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/scripts/run_distribute.sh" "$@" # where the reference has it
