"""What several processes of a test run: the trainings of a list, one after another."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from san_llm.launch.launcher import leave
from san_llm.launch.processes import agree, is_first
from san_llm.recipe.read import load_recipe
from san_llm.runs.folder import new_run
from san_llm.train.run import train

engine = os.environ.get("ACCELERATE_USE_FSDP", "false")
for path, folder in json.loads(Path(sys.argv[1]).read_text()):
    os.environ["ACCELERATE_USE_FSDP"] = engine  # which a training takes
    recipe = load_recipe(Path(path))
    train(recipe, agree(new_run(recipe, Path(folder), overwrite=False) if is_first() else Path()))
leave()
