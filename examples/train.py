"""Train a byte-level GPT with desynchronised replicas, and once more synchronously, and compare.

    python examples/train.py --config configs/des-loc-adam.json

Runs itself as --processes local processes, first with the given DeepSpeed JSON, then (unless --no-baseline) with the
same JSON without its "deslo" block and with AdamW: same model, same data in the same order, same number of tokens.
--framework takes the same JSON to DDP, FSDP2, Accelerate or plain torch. Under a launcher of your own it is one rank of
the given run: examples/launch/.
"""

from harness.command import main

if __name__ == "__main__":
    main()
