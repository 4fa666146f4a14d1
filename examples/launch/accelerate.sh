#!/usr/bin/env bash
# One replica per node with accelerate launch. Run this on every node, with HEAD the address of the first, and NODE their
# number:
#
#     HEAD=10.0.0.1 NODE=0 examples/launch/accelerate.sh --steps 5000    # NODE=1 on the second
#
# How ranks lie on nodes, and which variables choose the network, is told in torchrun.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

nodes=${NODES:-2}
exec accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
  --num_machines "$nodes" --machine_rank "${NODE:?expected 0 on the first node, 1 on the second, ...}" \
  --num_processes $((nodes * ${RANKS:-8})) \
  --main_process_ip "${HEAD:?expected the address of the first node}" --main_process_port "${PORT:-29500}" \
  examples/train.py --framework accelerate --config configs/des-loc-adam.json --replica-size auto "$@"
