# The door to the launcher that every test/*.sh sources.
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch/launch.sh" "$@"
