"""SAN without the rest of san-llm: PEFT's ``get_peft_model`` and transformers' ``Trainer``.

``python examples/peft_trainer.py MODEL ROWS.json OUTPUT [STEPS]``

ROWS.json is a list of objects with ``instruction``, ``input`` and ``output``. OUTPUT gets the
adapter, and ``merged`` in it a checkpoint that needs neither PEFT nor san-llm.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from san_llm import SanConfig

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{question}\n\n### Response:\n"
)


def main(base: str, rows: str, output: str, steps: str = "40") -> None:
    """Train, save the adapter, and merge it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        question = "\n".join(filter(None, (row["instruction"], row["input"])))
        prompt = tokenizer(PROMPT.format(question=question))["input_ids"]
        answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False)
        return {
            "input_ids": prompt + answer["input_ids"],
            "labels": [-100] * len(prompt) + answer["input_ids"],  # only the answer is learned
        }

    data = Dataset.from_list(json.loads(Path(rows).read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, SanConfig(task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=int(steps),
            per_device_train_batch_size=8,
            learning_rate=5e-3,  # scales want more than weights do
            lr_scheduler_type="linear",
            warmup_steps=4,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data.map(encode, remove_columns=data.column_names),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.save_pretrained(output)
    merged = model.merge_and_unload()
    merged.save_pretrained(Path(output) / "merged")
    tokenizer.save_pretrained(Path(output) / "merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
