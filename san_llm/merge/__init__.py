"""An adapter and its base become one stock checkpoint, streamed or quantized."""
