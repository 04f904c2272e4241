"""SAN in TRL: its ``SFTTrainer`` takes a ``SanConfig`` as it takes any PEFT config.

``python examples/trl_sft.py MODEL ROWS.json OUTPUT [STEPS]``

ROWS.json is a list of objects with ``instruction``, ``input`` and ``output``. OUTPUT gets the
adapter; ``PeftModel.from_pretrained`` loads it after ``import san_llm``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from san_llm import SanConfig

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{question}\n\n### Response:\n"
)


def ask(row: dict[str, str]) -> dict[str, str]:
    """Return a row as TRL wants it: of a prompt and a completion only the second is learned."""
    question = "\n".join(filter(None, (row["instruction"], row["input"])))
    return {"prompt": PROMPT.format(question=question), "completion": row["output"]}


def main(base: str, rows: str, output: str, steps: str = "40") -> None:
    """Train, and save the adapter."""
    data = Dataset.from_list(json.loads(Path(rows).read_text(encoding="utf-8")))
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=output,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            learning_rate=5e-3,  # scales want more than weights do
            warmup_steps=4,
            logging_steps=5,
            max_length=256,
            bf16=torch.cuda.is_available(),  # TRL's default is True
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data.map(ask, remove_columns=data.column_names),
        peft_config=SanConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
