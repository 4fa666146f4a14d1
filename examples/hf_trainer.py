"""The Hugging Face Trainer with desynchronised replicas: a small Llama of random weights that learns to count.

torchrun --nproc_per_node 4 examples/hf_trainer.py --config configs/des-loc-adam.json               # DDP
torchrun --nproc_per_node 4 examples/hf_trainer.py --config configs/des-loc-adam.json --deepspeed   # ZeRO
accelerate launch --config_file configs/accelerate/fsdp2.yaml examples/hf_trainer.py --config ...   # FSDP2
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import deslo_plugin
from deslo_plugin.frameworks.hf_trainer import AverageBeforeSave

CONTEXT, VOCABULARY = 32, 64


class Counting(Dataset):
    """Windows of 0, 1, 2, ... that start anywhere and step by one to three: ``input_ids`` and ``labels``, (32,)
    int64."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + (1 + index % 3) * torch.arange(CONTEXT)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def main(args: Namespace) -> None:
    if args.deepspeed and not torch.cuda.is_available():
        import deepspeed

        # an all-reduce for inference on CPUs, which DeepSpeed would compile first, for half a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)  # every rank builds the same model; attach_accelerator checks it
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
    blocks = json.loads(args.config.read_text())
    if args.replica_size is not None:
        blocks["deslo"]["replica_size"] = args.replica_size
    params = blocks["optimizer"]["params"]
    beta1, beta2 = params.get("betas", ["auto", "auto"])
    same_as_json = {} if "auto" in (beta1, beta2) else {"adam_beta1": beta1, "adam_beta2": beta2}
    training = TrainingArguments(
        output_dir=args.save or tempfile.mkdtemp(),
        save_strategy="steps" if args.save else "no",
        save_steps=args.steps // 2,
        max_steps=args.steps,
        warmup_steps=max(1, args.steps // 20),  # for "auto" in a JSON; DeepSpeed takes no 0
        per_device_train_batch_size=8,
        max_grad_norm=1.0,
        learning_rate=3e-3 if params["lr"] == "auto" else params["lr"],
        lr_scheduler_type="constant",
        **same_as_json,
        ddp_find_unused_parameters=False,  # else every backward would send a bitmap to all ranks: attach refuses it
        use_cpu=not torch.cuda.is_available(),
        deepspeed=blocks if args.deepspeed else None,
        report_to=[],
        disable_tqdm=True,
        logging_steps=args.steps,
    )
    if args.deepspeed:  # the JSON has optimizer and deslo: importing deslo_plugin was all
        trainer = Trainer(model, training, train_dataset=Counting())
    else:
        ours = deslo_plugin.DesLoc, {"config": {key: blocks[key] for key in ("optimizer", "deslo")}}
        trainer = Trainer(
            model,
            training,
            train_dataset=Counting(),
            optimizer_cls_and_kwargs=ours,
            # DeepSpeed's engine needs no such thing
            callbacks=[AverageBeforeSave()] if args.save else [],
        )
        deslo_plugin.attach_accelerator(trainer.accelerator)
    trainer.train(resume_from_checkpoint=args.resume)

    wrapped = trainer.model_wrapped
    loss = _loss(deslo_plugin.averaged_state_dict(wrapped), model)
    if trainer.is_world_process_zero():
        moved = (wrapped.deslo if args.deepspeed else trainer.accelerator.deslo).stats
        print(
            json.dumps({"loss": loss, "bytes": dict(moved.bytes), "seconds_exposed": moved.seconds_exposed}), flush=True
        )


@torch.no_grad()
def _loss(weights: dict[str, torch.Tensor], like: LlamaForCausalLM) -> float:
    """Mean cross-entropy in nats of the model with ``weights``: plain transformers, nothing of ours in it."""
    model = LlamaForCausalLM(like.config)
    model.load_state_dict(weights)
    batch = torch.stack([Counting()[index]["input_ids"] for index in range(64)])
    return model.eval()(input_ids=batch, labels=batch).loss.item()


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config", type=Path, required=True, help='JSON with "optimizer" and "deslo" blocks')
    parser.add_argument("--deepspeed", action="store_true", help="give the whole JSON to DeepSpeed")
    parser.add_argument("--replica-size", type=int, help='ranks per replica, in place of the "deslo" block\'s')
    parser.add_argument("--save", help="folder of checkpoints, one at half time and one at the end (default: none)")
    parser.add_argument("--resume", help="a checkpoint of --save to go on from")
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args())
    torch.distributed.barrier()
    # All is written. What would follow is the end of the libraries' own threads, which aborts now and then.
    sys.stdout.flush()
    os._exit(0)
