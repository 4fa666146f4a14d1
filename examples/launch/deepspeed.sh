#!/usr/bin/env bash
# One replica per node with DeepSpeed's launcher. Run this on one node; it starts the others through pdsh and ssh, in the
# same folder and with the same Python:
#
#     HOSTFILE=my-hostfile examples/launch/deepspeed.sh --steps 5000
#
# How ranks lie on nodes, and which variables choose the network, is told in torchrun.sh. Of this shell's variables only
# NCCL_*, PYTHON* and UCX* reach the other nodes: write a line such as GLOO_SOCKET_IFNAME=eth0 into ~/.deepspeed_env.
set -euo pipefail
cd "$(dirname "$0")/../.."

# without --no_local_rank the script would have to take an argument --local_rank
exec deepspeed --hostfile "${HOSTFILE:-examples/launch/hostfile}" --no_local_rank \
  examples/train.py --framework deepspeed --config configs/des-loc-adam.json --replica-size auto "$@"
