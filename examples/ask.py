"""Ask a merged model one question, with stock transformers and nothing of san-llm.

``python examples/ask.py CHECKPOINT "QUESTION"``
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{question}\n\n### Response:\n"
)


def main(checkpoint: str, question: str) -> None:
    """Print the model's answer, found with 4 beams."""
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    prompt = tokenizer(PROMPT.format(question=question), return_tensors="pt")
    tokens = model.generate(**prompt, num_beams=4, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
