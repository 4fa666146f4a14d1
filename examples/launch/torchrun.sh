#!/usr/bin/env bash
# One replica per node with torchrun. Run this on every node, with HEAD the address of one of them, the same everywhere:
#
#     HEAD=10.0.0.1 examples/launch/torchrun.sh --framework ddp --steps 5000
#
# Ranks are numbered node by node, by every launcher in this folder. With 8 on each of 2 nodes, ranks 0 to 7 are the first
# node and, by --replica-size auto, replica 0; ranks 8 to 15 are replica 1. Gradients then never leave a node, and averages
# run between ranks 0 and 8, 1 and 9, and so on. deslo compares hostnames at start and warns of a replica that lies on more
# nodes than it needs; the banner says how many replicas of how many ranks there are.
#
# On nodes with several networks, name the one that the averages are to take: NCCL_SOCKET_IFNAME=eth0 for what is on GPUs
# (NCCL_IB_HCA on InfiniBand), GLOO_SOCKET_IFNAME=eth0 for what is on CPUs. Every node needs both.
set -euo pipefail
cd "$(dirname "$0")/../.."

exec torchrun \
  --nnodes "${NODES:-2}" --nproc_per_node "${RANKS:-gpu}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:?expected the address of one of the nodes}:${PORT:-29500}" \
  examples/train.py --framework fsdp --config configs/des-loc-adam.json --replica-size auto "$@"
