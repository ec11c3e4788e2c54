source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/../../common/launch/env_npu.sh"
