# Sourced at the top of a script that runs others beside itself: the script gets a process group of its own, of which
# nothing goes on when it ends, fails or is interrupted. (bash alone ends neither what runs below a job nor, at SIGTERM,
# what it waits for; and SIGINT never reaches a job.)
if [[ -z ${WHOLE_GROUP:-} ]]; then
  set -m # the next job has a group
  WHOLE_GROUP=1 bash "$0" "$@" &
  group=$!
  end_group() {
    kill -- -$group || return 0
    for _ in {1..50}; do kill -0 -- -$group || break; sleep 0.1; done # a training writes down where it stopped
  } 2>/dev/null
  trap 'end_group; exit 130' INT
  trap 'end_group; exit 143' TERM HUP
  code=0
  wait $group || code=$?
  end_group
  exit $code
fi
unset WHOLE_GROUP
