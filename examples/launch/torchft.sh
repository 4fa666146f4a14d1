#!/usr/bin/env bash
# One replica that is started again for as long as the job lasts. Run this on every node, with HEAD the address of one of them:
#
#     HEAD=10.0.0.1 examples/launch/torchft.sh --steps 100000
#
# and on that one, before the others, the lighthouse too:
#
#     torchft_lighthouse --min_replicas 2 --join_timeout_ms 60000 --heartbeat_timeout_ms 1000
#
# What the options of both mean for a job is in docs/live-membership.md.
set -uo pipefail
cd "$(dirname "$0")/../.."

export TORCHFT_LIGHTHOUSE="http://${HEAD:?expected the address of the node of the lighthouse}:${PORT:-29510}"
until python examples/live.py --replica "${REPLICA:-$(hostname)}" "$@"; do
  echo "the replica ended with $?; it starts again in 5 s and takes over what the others have come to" >&2
  sleep 5
done
