#!/usr/bin/env bash
# Runs the agent, and again whenever it ends, in a container that stays. Others share the container's
# network and process ids: if it ended with the agent, its servers would die, and the proxy would be
# cut off from the published port. So the servers serve on, and the next agent takes them over.
set -uo pipefail

agent=
end() {
  trap - TERM INT
  kill -TERM "$agent" 2>/dev/null
  wait "$agent"
  exit 0
}
trap end TERM INT

while true; do
  python3 -m trainyard agent &
  agent=$!
  wait "$agent"
  echo "The agent ended with $?; it is started again." >&2
  sleep 1 &
  wait $!
done
