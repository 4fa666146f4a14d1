"""The Hugging Face Trainer: torchrun --nproc_per_node 2 examples/first/train_trainer.py FOLDER"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import deslo_plugin

config = {
    "optimizer": {"params": {"lr": 1e-2, "sync_every": {"params": 8, "exp_avg": 24, "exp_avg_sq": 48}}},
    "deslo": {"replica_size": 1},
}
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
count = [
    {"input_ids": (torch.arange(8) + start) % 64, "labels": (torch.arange(8) + start) % 64} for start in range(512)
]
trainer = Trainer(
    model=model,
    args=TrainingArguments(sys.argv[1], max_steps=60, per_device_train_batch_size=4, report_to="none", save_steps=60),
    train_dataset=count,
    optimizers=(deslo_plugin.DesLoc(model.parameters(), config), None),
    callbacks=[deslo_plugin.AverageBeforeSave()],  # what it saves is one model
)
deslo_plugin.attach_accelerator(trainer.accelerator)
loss = trainer.train().training_loss
if trainer.is_world_process_zero():
    print(f"loss {loss:.3f}, {trainer.accelerator.deslo.stats.bytes.total():,} bytes")
