"""Where a key of another program has its place: what a recipe that has one is told.

The names are those of the tables in docs/moving.md, which a test holds against these.
"""

from __future__ import annotations

_BATCH = "training.batch_size, rows of an optimizer step over all devices"
_BEST = "none: the checkpoint with the lowest held-out loss is kept"
_ADAMW = "none: the optimizer is AdamW"
_LOG = "none: every step is in the run's log.jsonl"

NONE = "none: "  # begins why there is no counterpart

# The name, and what to write: a key, a key with its value, an option; or why there is none.
ALIASES = {
    # LLM-Adapters' finetune.py
    "adapter_name": "method.name",
    "base_model": "base.model",
    "cutoff_len": "data.cutoff",
    "data_path": "data.train",
    "eval_step": "training.evaluate_every",
    "group_by_length": "none: rows are packed without padding",
    "load_8bit": "base.quantization: 8bit",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_target_modules": "method.target_modules",
    "num_epochs": "training.epochs",
    "output_dir": "--output",
    "resume_from_checkpoint": "san-llm train RUN --resume",
    "save_step": "training.evaluate_every",
    "train_on_inputs": "data.loss",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "val_set_size": "data.held_out",
    "wandb_project": "training.report_to: [wandb]",
    # LLaMA-Factory
    "bf16": "base.dtype: bfloat16",
    "dataset": "data.train",
    "dataset_dir": "data.train",
    "deepspeed": "--accelerate deepspeed_zero3",
    "disable_gradient_checkpointing": "training.gradient_checkpointing",
    "eval_steps": "training.evaluate_every",
    "finetuning_type": "method.name",
    "gradient_accumulation_steps": _BATCH,
    "lora_rank": "method.rank",
    "lora_target": "method.target_modules",
    "lr_scheduler_type": "training.schedule",
    "mask_history": "data.learn: last turn",
    "max_samples": "data.limit",
    "model_name_or_path": "base.model",
    "neat_packing": "training.packing",
    "num_train_epochs": "training.epochs",
    "overwrite_output_dir": "--overwrite",
    "per_device_train_batch_size": "training.micro_batch_size",
    "quantization_bit": "base.quantization: 4bit",
    "save_steps": "training.evaluate_every",
    "stage": "none: tuning is supervised",
    "template": "data.prompt: chat",
    "train_on_prompt": "data.loss",
    "use_dora": "method.name: dora",
    "val_size": "data.held_out",
    "warmup_ratio": "training.warmup_share",
    # PEFT, TRL, transformers and others
    "activation_checkpointing": "training.gradient_checkpointing",
    "adam_beta1": _ADAMW,
    "adam_beta2": _ADAMW,
    "adam_epsilon": _ADAMW,
    "bias": "none: no bias is trained; method.shift trains SAN's",
    "data_seed": "training.seed",
    "dataloader_num_workers": "data.workers",
    "early_stopping_patience": _BEST,
    "early_stopping_threshold": _BEST,
    "eval_strategy": "training.evaluate_every",
    "fp16": "base.dtype: float16",
    "grad_accum": _BATCH,
    "fsdp": "--accelerate fsdp2",
    "gradient_clipping": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "gpus": "--processes",
    "load_best_model_at_end": _BEST,
    "load_in_4bit": "base.quantization: 4bit",
    "load_in_8bit": "base.quantization: 8bit",
    "logging_steps": _LOG,
    "logging_strategy": _LOG,
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "max_length": "data.cutoff",
    "max_seq_length": "data.cutoff",
    "metric_for_best_model": _BEST,
    "model": "base.model",
    "num_gpus": "--processes",
    "optim": _ADAMW,
    "optimizer": _ADAMW,
    "patience": _BEST,
    "per_device_eval_batch_size": "training.micro_batch_size",
    "precision": "base.dtype",
    "prompt_template": "data.prompt",
    "push_to_hub": "san-llm push",
    "r": "method.rank",
    "run_name": "--output",
    "save_strategy": "training.evaluate_every",
    "save_total_limit": "training.keep_checkpoints",
    "scheduler": "training.schedule",
    "seq_len": "data.cutoff",
    "sequence_len": "data.cutoff",
    "torch_dtype": "base.dtype",
    "train_file": "data.train",
    "use_rslora": "none: the low-rank product counts alpha / rank",
    "wd": "training.weight_decay",
}


def called_here(name: str) -> str | None:
    """Return what another program's key is here, or why it has no place; None for no such key."""
    place = ALIASES.get(name.lower().replace("-", "_"))
    if place is None or place.startswith(NONE):
        return place and f"there is {place}"
    return f"here it is {place}"
