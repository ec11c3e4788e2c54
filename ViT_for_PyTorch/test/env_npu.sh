source "$(dirname "${BASH_SOURCE[0]}")/../../common/launch/env_npu.sh"
